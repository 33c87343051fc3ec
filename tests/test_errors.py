"""Errors as an interface: each RequestError says which parameter is at fault, also after a trip through pickle."""

import ast
import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tinyserve
from tinyserve.checkpoints.hub import failures  # noqa: F401  # has an error of its own
from tinyserve.errors import ContextLengthError, IncompleteError, RequestError, TinyserveError
from tinyserve.server.errors import ApiError

pytestmark = pytest.mark.fast

PACKAGE = Path(tinyserve.__file__).parent


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every RequestError that the package raises, with its place."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "RequestError":
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


def test_every_request_error_gives_its_param() -> None:
    """By keyword, so that None is a decision and not an accident."""
    found = list(calls())
    assert len(found) > 40
    silent = [where for where, call in found if "param" not in [keyword.arg for keyword in call.keywords]]
    assert not silent


def test_a_request_error_without_a_param_is_a_mistake() -> None:
    with pytest.raises(TypeError):
        RequestError("a sentence")  # type: ignore[call-arg]


def kinds(base: type[BaseException]) -> list[type[BaseException]]:
    return [base, *(kind for one in base.__subclasses__() for kind in kinds(one))]


EXAMPLES: dict[str, BaseException] = {
    "RequestError": RequestError("A sentence.", param="messages[0].content"),
    "ContextLengthError": ContextLengthError("A sentence.", param=None),
    "IncompleteError": IncompleteError("A sentence.", [1, "two"]),
    "ApiError": ApiError(429, "A sentence.", param="n", code="queue_full", retry_after=3),
}


@pytest.mark.parametrize("kind", [*kinds(TinyserveError), ApiError], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_every_error_survives_a_trip_to_another_process(kind: Any, copied: Callable[[Any], Any]) -> None:
    """A pool of processes waits for ever for an exception that cannot be read."""
    error = EXAMPLES[kind.__name__] if kind.__name__ in EXAMPLES else kind("A sentence.")
    other = copied(error)
    assert type(other) is kind and str(other) == "A sentence." and vars(other) == vars(error)
