"""Calls into the tokenizers library: whatever it raises over a checkpoint's files becomes one sentence.

Knows how the library fails, and nothing of what it is asked.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from tinyserve.errors import CheckpointError, TinyserveError


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Within, errors of the library are CheckpointErrors that begin with `what`: a file, and what it fails to be.

    It raises bare Exceptions, and pyo3's PanicException where Rust panics, which derives from BaseException alone and
    can be imported from nowhere.
    """
    try:
        yield
    except TinyserveError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise CheckpointError(
            f"{what} ({reason:.300}): take the tokenizer's files from the model's repository."
        ) from None
