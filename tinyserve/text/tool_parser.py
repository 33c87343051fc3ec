"""Tool calls read out of an answer, as it comes: pieces of text in, pieces of content and of calls out.

What becomes of a text does not depend on where it is cut. A tag that comes to nothing, and what is no call, are content
like any other; white space beside a call is not. A call is one once its name is there and its arguments have begun:
from there on its arguments are handed out as they come, whatever the model makes of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tinyserve.text.tokenizer.stops import longest_beginning
from tinyserve.text.tool_arguments import ArgumentsReader, JsonArguments, XmlArguments
from tinyserve.text.tools import ToolFormat, format_named, parameters_of

_LONGEST_HEAD = 400  # characters before a call's arguments, for its name to be told before they are whole
_JSON_HEAD = re.compile(
    r"""\{\s* "name" \s*:\s* ("(?:[^"\\]|\\.)+") \s*,\s* "(?:arguments|parameters)" \s*:\s* (?=\{)""", re.VERBOSE
)
_XML_OPENS = "<function="
_XML_HEAD = re.compile(r"<function=\s*([^<>\s]+)\s*>")
_NAMED_HEAD = re.compile(r"([\w.-]{1,64})(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")


@dataclass(frozen=True)
class ToolCall:
    """A call of `name`; `arguments` is the text of a JSON object, as OpenAI has it and as the model wrote it.

    It is whole and valid where the answer was not cut off, and the model made no mistake.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolCallDelta:
    """What an answer's call number `index` has more: first its name, then the text of its arguments in parts."""

    index: int
    name: str | None = None
    arguments: str = ""


def parse_tool_calls(text: str, format: str, tools: Sequence[Mapping[str, Any]] = ()) -> tuple[str, list[ToolCall]]:
    """The content of a whole answer, and its calls; RequestError for a format that is not in FORMATS."""
    parser = ToolCallParser(format, tools)
    content, deltas = parser.push(text)
    rest, more = parser.finish()
    return content + rest, joined_calls([*deltas, *more])


def joined_calls(deltas: Sequence[ToolCallDelta]) -> list[ToolCall]:
    """The calls that these are the parts of."""
    names, parts = list[str](), list[list[str]]()
    for delta in deltas:
        if delta.name is not None:
            names.append(delta.name)
            parts.append([])
        parts[-1].append(delta.arguments)
    return [ToolCall(name, "".join(arguments)) for name, arguments in zip(names, parts, strict=True)]


class ToolCallParser:
    """Reads one answer. What may still become a call is held back until it is clear."""

    def __init__(self, format: str, tools: Sequence[Mapping[str, Any]] = (), only_one: bool = False) -> None:
        """`tools`, in OpenAI's form, tell which values in tags are text; behind `only_one` call nothing is read."""
        self._format = format_named(format)
        self._tools, self._only_one = tools, only_one
        self._closes = self._format.closes.strip()
        self._opens = tuple(filter(None, [self._format.opens.strip()]))
        if self._format.syntax == "xml":
            self._opens += (_XML_OPENS,)  # models leave out the tag before it
        self._held = ""
        self._state: Callable[[bool], bool] = self._at_start if self._format.bare else self._in_text
        self._call_at = self._tag_end = 0  # where in the held text a call is to begin, and the tag before it ends
        self._in_list = False
        self._object, self._scanned = JsonArguments(), 0  # of a call that is read whole, up to here
        self._arguments: ArgumentsReader = self._object
        self._content: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self._num_calls = 0
        self.num_whole = 0  # calls that are over

    def push(self, piece: str) -> tuple[str, list[ToolCallDelta]]:
        """Take in a piece of the answer; returns the content and the parts of calls that are certain now."""
        return self._read(piece, final=False)

    def finish(self) -> tuple[str, list[ToolCallDelta]]:
        """The answer is over: nothing is held back any more."""
        return self._read("", final=True)

    @property
    def is_within_arguments(self) -> bool:
        """Whether the arguments of the last call are not whole yet."""
        return self._state == self._in_arguments

    def _read(self, piece: str, final: bool) -> tuple[str, list[ToolCallDelta]]:
        self._held += piece
        self._content, self._deltas = [], []
        while self._held and self._state(final):
            pass
        return "".join(self._content), self._deltas

    # Each state takes something off the held text, or goes on to another state; False: it needs more text.

    def _at_start(self, final: bool) -> bool:
        blank = _blank(self._held)
        if blank == len(self._held) and not final:
            return False
        if self._held[blank : blank + 1] in ("{", "["):
            return self._expect_call(blank, blank)
        self._state = self._in_text
        return True

    def _in_text(self, final: bool) -> bool:
        found = [(at, tag) for tag in self._opens if (at := self._held.find(tag)) >= 0]
        if found:
            at, tag = min(found)
            shown = len(self._held[:at].rstrip())
            self._show(shown)
            tag_end = at - shown + len(tag)
            return self._expect_call(at - shown if tag == _XML_OPENS else tag_end, tag_end)
        if final or not self._opens:
            self._show(len(self._held))
        else:
            begun = max(longest_beginning(self._held, tag) for tag in self._opens)
            self._show(len(self._held[: len(self._held) - begun].rstrip()))
        return False

    def _in_call(self, final: bool) -> bool:
        """Behind a tag: a call as JSON or a list of them, or a name before its arguments."""
        begin = self._skip_blank(self._call_at)
        if begin == len(self._held):
            return self._give_up() if final else False
        if self._held[begin] == "[" and not self._in_list:
            first = self._skip_blank(begin + 1)
            if first == len(self._held) and not final:
                return False
            if self._held[first : first + 1] == "{":
                return self._in_json(first, final, is_listed=True)
        elif self._held[begin] == "{":
            return self._in_json(begin, final, self._in_list)
        elif self._format.syntax != "json" and not self._in_list:
            return self._in_head(begin, final)
        return self._give_up()

    def _in_json(self, begin: int, final: bool, is_listed: bool) -> bool:
        """A call whose name stands first is told at once; one that is written in another order, when it is whole."""
        head = _JSON_HEAD.match(self._held, begin, begin + _LONGEST_HEAD)
        if head and (name := _text_of(head[1])):
            self._in_list = is_listed
            return self._open_call(name, head.end(), JsonArguments(), self._behind_arguments)
        inside = self._skip_blank(begin + 1)
        if self._held[inside : inside + 1] not in ("", '"', "}"):
            return self._give_up()
        self._scanned = max(begin, self._scanned)
        part = self._object.read(self._held[self._scanned :], final)
        self._scanned += part.num_read
        if not part.is_whole:
            return self._give_up() if final else False
        call = _call(self._held[begin : self._scanned], self._format)
        if call is None:
            return self._give_up()
        self._in_list = is_listed
        self._deltas.append(ToolCallDelta(self._num_calls, call.name, call.arguments))
        self._num_calls += 1
        self._held = self._held[self._scanned :]
        return self._close_call()

    def _in_head(self, begin: int, final: bool) -> bool:
        """A name, in a tag or before a bracket."""
        rest, mark = self._held[begin : begin + _LONGEST_HEAD], ">" if self._format.syntax == "xml" else "{"
        likely = mark == "{" or rest.startswith(_XML_OPENS) or _XML_OPENS.startswith(rest)
        if likely and mark not in rest and not final and len(rest) < _LONGEST_HEAD:
            return False
        head = (_XML_HEAD if mark == ">" else _NAMED_HEAD).match(rest)
        if head is None:
            return self._give_up()
        if mark == "{":
            return self._open_call(head[1], begin + head.end(), JsonArguments(), self._behind_call)
        arguments = XmlArguments(parameters_of(self._tools, head[1]))
        return self._open_call(head[1], begin + head.end(), arguments, self._behind_call)

    def _in_arguments(self, final: bool) -> bool:
        part = self._arguments.read(self._held, final)
        self._held = self._held[part.num_read :]
        if part.arguments:
            self._deltas.append(ToolCallDelta(self._num_calls - 1, arguments=part.arguments))
        if part.is_whole:
            return self._close_call() if self._then == self._behind_call else self._go_on(self._then)
        return False

    def _behind_arguments(self, final: bool) -> bool:
        """The rest of an object: its bracket, members that mean nothing here, or neither."""
        self._held = self._held.lstrip()
        if self._held.startswith(","):
            self._arguments = JsonArguments(depth=1)
            return self._go_on(self._in_rest_of_object)
        if not self._held:
            return False
        self._held = self._held.removeprefix("}")
        return self._close_call()

    def _in_rest_of_object(self, final: bool) -> bool:
        part = self._arguments.read(self._held, final)
        self._held = self._held[part.num_read :]
        return part.is_whole and self._close_call()

    def _behind_call(self, final: bool) -> bool:
        self._held = rest = self._held.lstrip()
        if self._in_list:
            at = self._skip_blank(1)
            if rest == "" or (rest[0] == "," and at == len(rest) and not final):
                return False
            if rest[0] == "," and rest[at : at + 1] == "{":
                return self._expect_call(at, at)
            self._in_list, self._held = False, rest.removeprefix("]")
            return True
        if self._closes and rest.startswith(self._closes):
            self._held = rest[len(self._closes) :].lstrip()
            return self._go_on(self._behind_tag)
        if self._closes and self._closes.startswith(rest) and not final:
            return False
        if self._format.bare:  # another may follow, behind a separator
            separator = rest[:1] in (";", ",")
            at = self._skip_blank(int(separator))
            if at >= len(rest) and not final:
                return False
            if rest[at : at + 1] == "{":
                return self._expect_call(at, at)
        return self._go_on(self._in_text)

    def _behind_tag(self, final: bool) -> bool:
        self._held = self._held.lstrip()
        return bool(self._held) and self._go_on(self._in_text)

    def _go_on(self, state: Callable[[bool], bool]) -> bool:
        self._state = state
        return True

    def _expect_call(self, call_at: int, tag_end: int) -> bool:
        self._call_at, self._tag_end = call_at, tag_end
        self._object, self._scanned = JsonArguments(), 0
        return self._go_on(self._in_call)

    def _open_call(self, name: str, at: int, arguments: ArgumentsReader, then: Callable[[bool], bool]) -> bool:
        """The call is one: its arguments are handed out as they come."""
        self._deltas.append(ToolCallDelta(self._num_calls, name))
        self._num_calls += 1
        self._held, self._arguments, self._then = self._held[at:], arguments, then
        return self._go_on(self._in_arguments)

    def _close_call(self) -> bool:
        self.num_whole += 1
        return self._go_on(self._over if self._only_one else self._behind_call)

    def _over(self, final: bool) -> bool:
        self._held = ""
        return False

    def _give_up(self) -> bool:
        self._show(self._tag_end)
        self._in_list = False
        return self._go_on(self._in_text)

    def _show(self, count: int) -> None:
        self._content.append(self._held[:count])
        self._held = self._held[count:]

    def _skip_blank(self, at: int) -> int:
        """Where in the held text the next character is that is no white space."""
        return at + _blank(self._held[at:])


def _blank(text: str) -> int:
    """How many characters of white space a text begins with."""
    return len(text) - len(text.lstrip())


def _text_of(quoted: str) -> str | None:
    """The text of a JSON string; None if it is none that could be sent."""
    try:
        text = str(json.loads(quoted))
        text.encode()
    except ValueError:  # a lone surrogate, say
        return None
    return text


def _call(text: str, format: ToolFormat) -> ToolCall | None:
    """The call of a JSON object; None if it is anything else."""
    try:
        item = json.loads(text, parse_constant=_refuse)
        name = item["name"]
        other = {"arguments": "parameters", "parameters": "arguments"}[format.arguments]
        key = format.arguments if format.arguments in item else other
        # Between tags it is a call without arguments; without them any object might have a name.
        arguments = item[key] if format.bare else item.get(key, {})
        if isinstance(arguments, str):  # some models write the text of an object
            arguments = json.loads(arguments, parse_constant=_refuse)
        if not isinstance(arguments, dict) or not isinstance(name, str) or not name:
            return None
        call = ToolCall(name, json.dumps(arguments, ensure_ascii=False))
        (call.name + call.arguments).encode()  # a lone surrogate is no text that could be sent
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return call


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
