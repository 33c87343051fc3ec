"""What a request is refused for. A RequestError's interface is its type and its `param`; sentences may change."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tinyserve.errors import RequestError


@contextmanager
def refused(param: str | None, sentence: str = "") -> Iterator[None]:
    """The block must raise RequestError for `param`; with `sentence`, its message must have these words."""
    with pytest.raises(RequestError) as caught:
        yield
    assert caught.value.param == param, str(caught.value)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
