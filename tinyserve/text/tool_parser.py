"""Tool calls read out of an answer, as it comes: pieces of text in, pieces of content and whole calls out.

What becomes of a text does not depend on where it is cut. A tag that comes to nothing, and a call that is none, are
content like any other; white space beside a call is not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from tinyserve.text.tokenizer.stops import longest_beginning
from tinyserve.text.tools import ToolFormat, format_named


@dataclass(frozen=True)
class ToolCall:
    """A call of `name`; `arguments` is the text of a JSON object, as OpenAI has it."""

    name: str
    arguments: str


def parse_tool_calls(text: str, format: str) -> tuple[str, list[ToolCall]]:
    """The content of a whole answer, and its calls; RequestError for a format that is not in FORMATS."""
    parser = ToolCallParser(format)
    content, calls = parser.push(text)
    rest, more = parser.finish()
    return content + rest, calls + more


class ToolCallParser:
    """Reads one answer. What may still become a call is held back until it is clear."""

    def __init__(self, format: str) -> None:
        self._format = format_named(format)
        self._opens, self._closes = self._format.opens.strip(), self._format.closes.strip()
        self._held = ""
        self._state = self._at_start if self._format.bare else self._in_text
        self._json_at = 0  # where in the held text a call's JSON is to begin
        self._end = _End()
        self._content: list[str] = []
        self._calls: list[ToolCall] = []

    def push(self, piece: str) -> tuple[str, list[ToolCall]]:
        """Take in a piece of the answer; returns the content and the calls that are certain now."""
        return self._read(piece, final=False)

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The answer is over: nothing is held back any more."""
        return self._read("", final=True)

    def _read(self, piece: str, final: bool) -> tuple[str, list[ToolCall]]:
        self._held += piece
        self._content, self._calls = [], []
        while self._held and self._state(final):
            pass
        return "".join(self._content), self._calls

    # Each state takes something off the held text, or goes on to another state; False: it needs more text.

    def _at_start(self, final: bool) -> bool:
        blank = _blank(self._held)
        if blank == len(self._held) and not final:
            return False
        if self._held[blank : blank + 1] in ("{", "["):
            return self._expect_call(blank)
        self._state = self._in_text
        return True

    def _in_text(self, final: bool) -> bool:
        found = self._held.find(self._opens) if self._opens else -1
        if found >= 0:
            shown = len(self._held[:found].rstrip())
            self._show(shown)
            return self._expect_call(found - shown + len(self._opens))
        if final or not self._opens:
            self._show(len(self._held))
        else:
            begun = longest_beginning(self._held, self._opens)
            self._show(len(self._held[: len(self._held) - begun].rstrip()))
        return False

    def _in_call(self, final: bool) -> bool:
        begin = self._json_at + _blank(self._held[self._json_at :])
        inside = begin + 1 + _blank(self._held[begin + 1 :])
        likely = {"": "", "{": '"}', "[": "{"}.get(self._held[begin : begin + 1])
        if likely is None or not set(self._held[inside : inside + 1]) <= set(likely):
            return self._give_up()
        end = self._end.find(self._held, begin)
        if end is None:
            return self._give_up() if final else False
        calls = _calls(self._held[begin:end], self._format)
        if calls is None:
            return self._give_up()
        self._calls += calls
        self._held = self._held[end:]
        self._state = self._behind_call
        return True

    def _behind_call(self, final: bool) -> bool:
        self._held = rest = self._held.lstrip()
        if self._closes and rest.startswith(self._closes):
            self._held = rest[len(self._closes) :].lstrip()
            self._state = self._behind_tag
            return True
        if self._closes and self._closes.startswith(rest) and not final:
            return False
        if self._format.bare:  # another may follow, behind a separator
            separator = rest[:1] in (";", ",")
            at = separator + _blank(rest[separator:])
            if at >= len(rest) and not final:
                return False
            if rest[at : at + 1] == "{":
                return self._expect_call(at)
        self._state = self._in_text
        return True

    def _behind_tag(self, final: bool) -> bool:
        self._held = self._held.lstrip()
        self._state = self._in_text if self._held else self._state
        return bool(self._held)

    def _expect_call(self, json_at: int) -> bool:
        self._json_at, self._end = json_at, _End()
        self._state = self._in_call
        return True

    def _give_up(self) -> bool:
        self._show(self._json_at)
        self._state = self._in_text
        return True

    def _show(self, count: int) -> None:
        self._content.append(self._held[:count])
        self._held = self._held[count:]


class _End:
    """Finds where a JSON object or array ends, looking at each character once."""

    def __init__(self) -> None:
        self._at, self._depth, self._quoted, self._escaped = 0, 0, False, False

    def find(self, text: str, begin: int) -> int | None:
        """The index behind the value that begins at `begin` of a growing text, or None."""
        for at in range(max(begin, self._at), len(text)):
            character = text[at]
            if self._escaped:
                self._escaped = False
            elif character == "\\" and self._quoted:
                self._escaped = True
            elif character == '"':
                self._quoted = not self._quoted
            elif not self._quoted:
                self._depth += (character in "{[") - (character in "}]")
                if self._depth == 0:
                    return at + 1
        self._at = len(text)
        return None


def _blank(text: str) -> int:
    """How many characters of white space a text begins with."""
    return len(text) - len(text.lstrip())


def _calls(text: str, format: ToolFormat) -> list[ToolCall] | None:
    """The calls of a JSON object, or of an array of them; None if it is anything else."""
    try:
        value = json.loads(text, parse_constant=_refuse)
        calls = [_call(item, format) for item in (value if isinstance(value, list) else [value])]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return calls or None


def _call(item: Any, format: ToolFormat) -> ToolCall:
    """A call from its JSON; raises ValueError, TypeError or KeyError if it is none."""
    name = item["name"]
    other = {"arguments": "parameters", "parameters": "arguments"}[format.arguments]
    key = format.arguments if format.arguments in item else other
    # Between tags it is a call without arguments; without them any object might have a name.
    arguments = item[key] if format.bare else item.get(key, {})
    if isinstance(arguments, str):  # some models write the text of an object
        arguments = json.loads(arguments, parse_constant=_refuse)
    if not isinstance(arguments, dict) or not isinstance(name, str) or not name:
        raise ValueError
    text = json.dumps(arguments, ensure_ascii=False)
    (name + text).encode()  # a lone surrogate is no text that could be sent
    return ToolCall(name, text)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
