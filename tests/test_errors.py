"""Errors as an interface: each RequestError says which parameter is at fault, also after a trip through pickle."""

import ast
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

import tinyserve
from tinyserve.errors import RequestError

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


@pytest.mark.parametrize("param", ["messages[0].content", None])
def test_a_request_error_survives_a_copy(param: str | None) -> None:
    error = RequestError("A sentence.", param=param)
    for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(other) is RequestError and (str(other), other.param) == ("A sentence.", param)
