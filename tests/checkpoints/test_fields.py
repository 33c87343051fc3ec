"""The reader of every file with keys: a value of any type or size is read as what it must be, or refused by its key."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from tinyserve.checkpoints.fields import Fields
from tinyserve.errors import CheckpointError, ConfigError

pytestmark = pytest.mark.fast

ODD = [
    *(10**400, -(10**400), 2**63, 2**31, 1e308, math.inf, -math.inf, math.nan, 1.5, -5, True),
    *("", "x", "++inf", "\ud800", b"x", [], [1, "x"], [[]], [None], {}, {"a": 1}, {"__float__": "x"}, "9" * 5000),
    ["y"] * 999,
]  # fmt: skip
READERS: dict[str, Callable[[Fields], Any]] = {
    "integer": lambda fields: fields.integer("k"),
    "number": lambda fields: fields.number("k"),
    "boolean": lambda fields: fields.boolean("k", default=False),
    "choice": lambda fields: fields.choice("k", ("a", "b")),
    "text": lambda fields: fields.text("k"),
    "names": lambda fields: fields.names("k"),
    "listed": lambda fields: fields.listed("k", int, "whole numbers"),
    "objects": lambda fields: fields.objects("k"),
    "token_id": lambda fields: fields.token_id("k"),
    "token_ids": lambda fields: fields.token_ids("k"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("value", ODD, ids=lambda value: f"{str(type(value))[8:-2]}")
def test_any_value_is_read_or_refused_in_a_sentence(reader: str, value: Any) -> None:
    for refusal in (ConfigError, CheckpointError):
        try:
            read = READERS[reader](Fields({"k": value}, "file", refusal))
        except refusal as error:
            assert str(error).startswith("file: 'k' ") and len(str(error)) < 250 and str(error).isprintable()
        else:
            assert not isinstance(read, float) or abs(read) < math.inf


@pytest.mark.parametrize("none", [None, -1, 2**32 - 1])
def test_an_id_that_says_none_is_none(none: Any) -> None:
    """-1, also without its sign, as llama.cpp's and older files have it."""
    fields = Fields({"one": none, "many": [none, 7, none, 7, 8]}, "file")
    assert fields.token_id("one", default=5) is None
    assert fields.token_ids("one", default=5) == ()
    assert fields.token_ids("many") == (7, 8)
    assert fields.token_id("absent", default=5) == 5 and fields.token_ids("absent", default=5) == (5,)


def test_true_is_no_number_of_a_list() -> None:
    with pytest.raises(ConfigError, match="'k' must be a list of whole numbers, but it is"):
        Fields({"k": [1, True]}, "file").listed("k", int, "whole numbers")


def test_what_lies_in_an_object_is_named_with_its_place() -> None:
    with pytest.raises(CheckpointError, match=r"^file: in 'outer': 'inner' must be text"):
        Fields({}, "file", CheckpointError).inside("outer", {"inner": 5}).text("inner")
