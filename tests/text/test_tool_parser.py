"""Calls are read out of answers the same wherever the text is cut, and nothing that is no call is lost."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyserve.text.tool_parser import ToolCall, ToolCallParser, parse_tool_calls
from tinyserve.text.tools import FORMATS

pytestmark = pytest.mark.fast

F = ToolCall("f", '{"a": 1}')
G = ToolCall("g", "{}")
ONE = '{"name": "f", "arguments": {"a": 1}}'
TWO = '{"name": "g", "arguments": {}}'
LLAMA = ONE.replace("arguments", "parameters")


@pytest.mark.parametrize(
    ("format", "text", "content", "calls"),
    [
        ("hermes", "Hello", "Hello", []),
        ("hermes", f"<tool_call>{ONE}</tool_call>", "", [F]),
        ("granite-4", f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{TWO}\n</tool_call>", "", [F, G]),
        ("hermes", f"Let me see.\n\n<tool_call>\n{ONE}\n</tool_call>\n Done. ", "Let me see.Done. ", [F]),
        ("hermes", f"<tool_call>[{ONE}, {TWO}]</tool_call>", "", [F, G]),
        ("hermes", f"<tool_call>\n{ONE}", "", [F]),
        ("hermes", f"<tool_call>{ONE}</tool", "</tool", [F]),
        ("hermes", f"<tool_call>{ONE} and so on", "and so on", [F]),
        ("hermes", f"<tool_call>{LLAMA}</tool_call>", "", [F]),
        ("hermes", '<tool_call>{"name": "g"}</tool_call>', "", [G]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [F]),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"s": "</tool_call> } \\" \\\\"}}</tool_call>',
            "",
            [ToolCall("f", '{"s": "</tool_call> } \\" \\\\"}')],
        ),
        ("hermes", '<tool_call>{"name": "é", "arguments": {"日": "\\u672c"}}', "", [ToolCall("é", '{"日": "本"}')]),
        # malformed: all of it is content, and what comes after is read on
        ("hermes", "a <tool_call", "a <tool_call", []),
        ("hermes", "a \n", "a \n", []),
        ("hermes", "a <tool_call> b", "a <tool_call> b", []),
        ("hermes", "<tool_call>{f(1)}</tool_call>", "<tool_call>{f(1)}</tool_call>", []),
        ("hermes", '<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
        ("hermes", f" <tool_call>{{'x'}}</tool_call><tool_call>{ONE}", " <tool_call>{'x'}</tool_call>", [F]),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}', '<tool_call>{"name": 3, "arguments": {}}', []),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}', '<tool_call>{"name": "", "arguments": {}}', []),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}', '<tool_call>{"name": "f", "arguments": [1]}', []),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}',
         '<tool_call>{"name": "f", "arguments": {"a": NaN}}', []),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}',
         '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}', []),
        ("hermes", '<tool_call>{"name": "f", "arguments": {]}', '<tool_call>{"name": "f", "arguments": {]}', []),
        ("hermes", "<tool_call>[]</tool_call>", "<tool_call>[]</tool_call>", []),
        ("hermes", f"<tool_call>[{ONE}, 3]", f"<tool_call>[{ONE}, 3]", []),
        ("hermes", ONE, ONE, []),
        # Llama: JSON, with or without its tag
        ("llama-3", LLAMA, "", [F]),
        ("llama-3", f" \n{LLAMA} ", "", [F]),
        ("llama-3", f"<|python_tag|>{LLAMA}", "", [F]),
        ("llama-3", f"{LLAMA}; {LLAMA}", "", [F, F]),
        ("llama-3", f"<|python_tag|>{LLAMA};{ONE}\n{LLAMA}", "", [F, F, F]),
        ("llama-3", f"Of course. <|python_tag|>{LLAMA}", "Of course.", [F]),
        ("llama-3", '{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [F]),
        ("llama-3", f"Of course: {LLAMA}", f"Of course: {LLAMA}", []),
        ("llama-3", '<|python_tag|>print("{}")', '<|python_tag|>print("{}")', []),
        ("llama-3", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
        ("llama-3", '{"name": "Bob"}', '{"name": "Bob"}', []),
        ("llama-3", f"{LLAMA}; and", "; and", [F]),
        ("llama-3", f'{LLAMA}; {{"b": 1}}', '; {"b": 1}', [F]),
        ("llama-3", f"{LLAMA};", ";", [F]),
        ("llama-3", "{curly} words", "{curly} words", []),
        ("llama-3", "[1] is a footnote", "[1] is a footnote", []),
        ("json", f"[{ONE},\n{TWO}]", "", [F, G]),
        ("json", f"{ONE}\n{TWO}", "", [F, G]),
        ("json", "plain", "plain", []),
        ("mistral", f"[TOOL_CALLS] [{ONE}, {TWO}]", "", [F, G]),
        ("mistral", f"[TOOL_CALLS]{ONE}", "", [F]),
        ("mistral", f"[{ONE}]", f"[{ONE}]", []),
        ("granite-3", f"<|tool_call|>[{ONE}]", "", [F]),
        ("granite-3", f"Hm. <|tool_call|> [{ONE}]", "Hm.", [F]),
    ],
)  # fmt: skip
def test_what_is_a_call_and_what_is_content(format: str, text: str, content: str, calls: list[ToolCall]) -> None:
    assert parse_tool_calls(text, format) == (content, calls)
    assert pieces(text, format, range(1, len(text))) == (content, calls), "character by character"


def pieces(text: str, format: str, cuts: Any) -> tuple[str, list[ToolCall]]:
    """The sum of what comes when the text is cut at these places."""
    parser, content, calls = ToolCallParser(format), "", []
    opens = FORMATS[format].opens.strip()
    edges = [0, *sorted(cuts), len(text)]
    for begin, end in pairwise(edges):
        more, found = parser.push(text[begin:end])
        assert not opens or not more.endswith(opens[:-1]), "a part of a tag is no content yet"
        content, calls = content + more, calls + found
    rest, found = parser.finish()
    assert parser.finish() == ("", [])
    return content + rest, calls + found


FRAGMENTS = [
    ONE, TWO, LLAMA, "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<|tool_call|>", "<tool",
    "</tool", ";", ",", " ", "\n", "{", "}", "[", "]", '"', "\\", "text", "é", '{"name"', '"}', "<", "|",
    f"<tool_call>{ONE}",
]  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=9).map("".join)


@pytest.mark.parametrize("format", FORMATS)
@settings(deadline=None, max_examples=150)
@example(text=f"<tool_call>{ONE}</tool_call>", data=None)
@given(text=texts, data=st.data())
def test_cuts_change_nothing(format: str, text: str, data: st.DataObject | None) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)))) if data else []
    whole = parse_tool_calls(text, format)
    assert pieces(text, format, cuts) == whole
    content, calls = whole
    if not calls:
        assert content == text, "no call: nothing is lost, white space included"
    letters = iter("".join(text.split()))
    assert all(letter in letters for letter in "".join(content.split())), "content is the text with pieces left out"


@pytest.mark.parametrize("format", ["hermes", "llama-3"])
def test_content_is_not_held_back_longer_than_needed(format: str) -> None:
    parser = ToolCallParser(format)
    assert parser.push("Hello") == ("Hello", [])
    assert parser.push(" ") == ("", []), "a tag may follow"
    assert parser.push("you <") == (" you", [])
    assert parser.push("3") == (" <3", [])
    tag = "<tool_call>" if format == "hermes" else "<|python_tag|>"
    assert parser.push(f"\n{tag}{ONE[:-1]}") == ("", [])
    assert parser.push("}") == ("", [F]), "a call comes with its last bracket"


def test_a_long_call_in_small_pieces_is_read_once() -> None:
    """Each character is looked at once: a megabyte in pieces takes no minutes."""
    text = f'<tool_call>{{"name": "f", "arguments": {{"a": "{"x" * 200_000}"}}}}</tool_call>'
    content, calls = pieces(text, "hermes", range(3, len(text), 3))
    assert content == "" and len(calls) == 1 and len(calls[0].arguments) == 200_009
