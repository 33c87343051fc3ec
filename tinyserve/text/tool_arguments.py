"""The arguments of one tool call, read as they come: text of the model in, text of a JSON object out.

A reader is given what there is of the text, and says how much of it is read for good, what that adds to the arguments,
and whether they are whole. It knows nothing of tags before a call, or of other calls.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, Protocol

from tinyserve.text.json_schema import takes_text, types_of
from tinyserve.text.tokenizer.stops import longest_beginning

_LONGEST_NAME = 200  # characters of a parameter's name; a tag that is not closed by then is none
_OPENS, _CLOSES = "<parameter=", "</function>"
_VALUE_ENDS = ("</parameter>", f"\n{_OPENS}", f"\n{_CLOSES}", "</tool_call>")  # the first may have been left out
_WORDS = {"True": True, "False": False, "None": None}  # as models write them that have seen much Python


class Part(NamedTuple):
    """What a reader made of the beginning of a text."""

    num_read: int  # characters; the rest is to be given again, with more behind it
    arguments: str
    is_whole: bool


class ArgumentsReader(Protocol):
    """Reads the arguments of one call."""

    def read(self, text: str, final: bool) -> Part:
        """Read on; `final`: no more text comes."""


class JsonArguments:
    """A JSON object as the model writes it; what is between its brackets is the model's, right or wrong."""

    def __init__(self, depth: int = 0) -> None:
        """`depth` brackets are open already."""
        self._depth, self._quoted, self._escaped = depth, False, False

    def read(self, text: str, final: bool) -> Part:
        """Read to the bracket that closes the first one."""
        for at, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = character == "\\", character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{}[]":
                self._depth += 1 if character in "{[" else -1
                if self._depth == 0:
                    return Part(at + 1, text[: at + 1], True)
        return Part(len(text), text, False)


class XmlArguments:
    """Parameters in tags: `<parameter=NAME>`, the value on lines of its own, `</parameter>`, and `</function>` at last.

    A value is text where the tool's schema takes only text there, or does not say; else it is JSON.
    """

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        """`schemas` are the tool's parameters by name."""
        self._schemas = schemas
        self._written = "{"  # not handed out yet
        self._num_parameters = 0
        self._schema: Any = None  # of the parameter whose value is being read
        self._takes_text = True
        self._parts: list[str] = []  # of a value that is no text
        self._in_value = self._is_begun = self._is_over = False

    def read(self, text: str, final: bool) -> Part:
        """Read on; parameters whose values are text come in parts, others whole."""
        at, is_whole = 0, False
        while not is_whole:
            size = self._read_value(text[at:], final) if self._in_value else self._read_tag(text[at:], final)
            if size is None:
                break
            at += size
            is_whole = self._is_over
        written, self._written = self._written, ""
        return Part(at, written, is_whole)

    # Each reads the beginning of a text, and returns how many characters of it; None: it needs more text.

    def _read_tag(self, text: str, final: bool) -> int | None:
        blank = len(text) - len(text.lstrip())
        rest = text[blank:]
        if not rest:
            return None
        if rest.startswith(_OPENS):
            end = rest.find(">", 0, _LONGEST_NAME)
            if end >= 0:
                self._begin(rest[len(_OPENS) : end].strip())
                return blank + end + 1
            if len(rest) < _LONGEST_NAME and not final:
                return None
        elif not final and (_OPENS.startswith(rest) or (_CLOSES.startswith(rest) and rest != _CLOSES)):
            return None
        self._written += "}"
        self._is_over = True
        return blank + len(_CLOSES) if rest.startswith(_CLOSES) else blank

    def _begin(self, name: str) -> None:
        self._written += (", " if self._num_parameters else "") + _json(name) + ": "
        self._num_parameters += 1
        self._schema, self._in_value, self._is_begun = self._schemas.get(name), True, False
        self._takes_text, self._parts = takes_text(self._schema), []

    def _read_value(self, text: str, final: bool) -> int | None:
        found = [(at, end) for end in _VALUE_ENDS if (at := text.find(end)) >= 0]
        if found:
            at, end = min(found)
            self._write(text[:at].removesuffix("\n") if end == _VALUE_ENDS[0] else text[:at])
            self._written += '"' if self._takes_text else _json(_value("".join(self._parts), self._schema))
            self._in_value = False
            return at + len(end) if end == _VALUE_ENDS[0] else at
        # The end of the text may be the beginning of a tag, and a line's end belongs to the tag behind it.
        held = 0 if final else max(longest_beginning(text, end) for end in ("\n" + _VALUE_ENDS[0], *_VALUE_ENDS))
        if certain := text[: len(text) - held]:
            self._write(certain)
        return len(certain) or None

    def _write(self, text: str) -> None:
        """Go on with a value: text is written as it comes, anything else kept until it is whole."""
        if not self._is_begun:
            self._written += '"' if self._takes_text else ""
            self._is_begun, text = True, text.removeprefix("\n")
        if self._takes_text:
            self._written += _json(text)[1:-1]
        else:
            self._parts.append(text)


def _value(text: str, schema: Any) -> Any:
    """A value that may be other than text; it is text where it is no JSON, or JSON's text where text would do."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text, parse_constant=_refuse)
        if not isinstance(value, str) or "string" not in types_of(schema):
            return value
    return _WORDS.get(text.strip(), text)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate is no text that could be sent
        return json.dumps(value)
    return text
