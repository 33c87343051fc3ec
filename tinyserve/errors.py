"""Every error tinyserve raises on purpose: one sentence that says what is wrong, where, and the way out.

The command line prints the sentence and exits with `exit_code`; it knows nothing else about errors.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any


class TinyserveError(Exception):
    """Something outside the user's hands failed: the network, the disk, a processor, or tinyserve itself."""

    exit_code = 1

    def __reduce__(self) -> "tuple[Any, ...]":
        """Pickled by what it holds: pickle itself would call the class with the message alone."""
        return _restored, (type(self), self.args, vars(self))


def _restored(kind: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(state)
    return error


class UserError(TinyserveError, ValueError):
    """Something the user can change is wrong: a name, an option, a prompt, a file."""

    exit_code = 2


class UnknownModelError(UserError):
    """No preset, folder, file or repository has this name."""


class ConfigError(UserError):
    """A config.json lacks a key, or asks for what is not built; the message names the key and its value."""


class CheckpointError(UserError):
    """A checkpoint's file is missing, truncated, corrupt or misshapen; the message names the file and the tensor."""


class RequestError(UserError):
    """A prompt or a sampling parameter cannot be served; the message has the numbers.

    `param` is the parameter at fault, as the Python API names it, with its place: messages[0].content. It is None only
    where no single one is.
    """

    def __init__(self, message: str, param: str | None):
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """A prompt, with room for an answer, is longer than the context."""


class IncompleteError(TinyserveError):
    """Some prompts of several failed; `outputs` has all in their order, and "error" as a finish_reason of those."""

    def __init__(self, message: str, outputs: Sequence[Any]):
        super().__init__(message)
        self.outputs = outputs


class EngineDeadError(TinyserveError):
    """The engine was closed, or a mistake of its own ended it: no request is served any more."""


class CacheLostError(TinyserveError):
    """A process that had a part of the model, and of its cache, has ended: what was computed has to be again."""


class HubError(TinyserveError):
    """A download failed: no network, a gated or missing repository, a full disk."""


class HubUnreachable(HubError):
    """The Hub does not answer from here, or not as the Hub does, or must not be asked; another source may."""


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """A sentence, with a space before it, that names the nearest of the known names; empty where none is near."""
    nearest = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
