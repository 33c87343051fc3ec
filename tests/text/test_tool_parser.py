"""Calls are read out of answers the same wherever the text is cut, and nothing that is no call is lost."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyserve.text.tool_parser import ToolCall, ToolCallDelta, ToolCallParser, joined_calls, parse_tool_calls
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
        ("hermes", '<tool_call>{"name": "\\u00e9", "arguments": {"日":"\\u672c"}}', "",
         [ToolCall("é", '{"日":"\\u672c"}')]),
        ("hermes", '<tool_call>{"arguments": {"a":1}, "name": "f"}</tool_call>', "", [F]),
        ("hermes", f'<tool_call>{ONE[:-1]}, "id": "}}]", "x": [{{}}]}}</tool_call>.', ".", [F]),
        ("hermes", f"<tool_call>{ONE[:-1]}</tool_call>.", ".", [F]),
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
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}',
         '<tool_call>{"name": "\\ud800", "arguments": {}}', []),
        ("hermes", '<tool_call>{"arguments": {"a": NaN}, "name": "f"}',
         '<tool_call>{"arguments": {"a": NaN}, "name": "f"}', []),
        ("hermes", '<tool_call>{"arguments": {"a": "\\ud800"}, "name": "f"}',
         '<tool_call>{"arguments": {"a": "\\ud800"}, "name": "f"}', []),
        ("hermes", '<tool_call>{"arguments": {]}', '<tool_call>{"arguments": {]}', []),
        # once its arguments have begun it is a call, right or wrong, whole or cut off
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}', "", [ToolCall("f", '{"a": NaN}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800"}}', "", [ToolCall("f", '{"a": "\\ud800"}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x', "", [ToolCall("f", '{"a": "x')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {', "", [ToolCall("f", "{")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {]}. ', ". ", [ToolCall("f", "{]")]),
        ("hermes", "<tool_call>[]</tool_call>", "<tool_call>[]</tool_call>", []),
        ("hermes", f"<tool_call>[3, {ONE}]", f"<tool_call>[3, {ONE}]", []),
        ("hermes", f"<tool_call>[{ONE}, 3]", ", 3]", [F]),
        ("hermes", f'<tool_call>[{ONE}, {{"a": 3}}, {TWO}] Well.', f', {{"a": 3}}, {TWO}] Well.', [F]),
        ("hermes", f"<tool_call>[{ONE},{TWO}", "", [F, G]),
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
        ("mistral-v11", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]x9[ARGS]{} So.', "So.", [F, G]),
        ("mistral-v11", 'Hm. [TOOL_CALLS] f {"a": 1}', "Hm.", [F]),
        ("mistral-v11", f"[TOOL_CALLS] [{ONE}, {TWO}]", "", [F, G]),
        ("mistral-v11", '[TOOL_CALLS]f(1) {"a": 1}', '[TOOL_CALLS]f(1) {"a": 1}', []),
        ("mistral-v11", "[TOOL_CALLS]f", "[TOOL_CALLS]f", []),
        ("granite-3", f"<|tool_call|>[{ONE}]", "", [F]),
        ("granite-3", f"Hm. <|tool_call|> [{ONE}]", "Hm.", [F]),
    ],
)  # fmt: skip
def test_what_is_a_call_and_what_is_content(format: str, text: str, content: str, calls: list[ToolCall]) -> None:
    assert parse_tool_calls(text, format) == (content, calls)
    assert pieces(text, format, range(1, len(text))) == (content, calls), "character by character"


def in_tags(name: str, /, **values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def called(name: str, /, **arguments: Any) -> ToolCall:
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


TYPED = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "any": {},
                    "unit": {"enum": ["c", "f"]},
                    "count": {"type": "integer"},
                    "share": {"type": "number"},
                    "yes": {"type": "boolean"},
                    "list": {"type": "array", "items": {"type": "string"}},
                    "item": {"$ref": "#/$defs/item"},
                    "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                    "word": {"type": ["string", "null"]},
                    "level": {"enum": [1, "two"]},
                },
            },
        },
    }
]


@pytest.mark.parametrize("format", ["qwen3-coder", "granite-4.2"])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (in_tags("f"), "", [called("f")]),
        (f"Well.\n\n{in_tags('f', text='Köln')}\n", "Well.", [called("f", text="Köln")]),
        (in_tags("f", text="a") + "\n" + in_tags("g", x="5"), "", [called("f", text="a"), called("g", x="5")]),
        (in_tags("f", text='a "b"\n\n  <c>\\</c>\n'), "", [called("f", text='a "b"\n\n  <c>\\</c>\n')]),
        (in_tags("f", text="", any="5", unit="c"), "", [called("f", text="", any="5", unit="c")]),
        (in_tags("f", count="-3", share="2.5e3", yes="true"), "", [called("f", count=-3, share=2500.0, yes=True)]),
        (in_tags("f", yes="False", maybe="None", word="null"), "", [called("f", yes=False, maybe=None, word=None)]),
        (in_tags("f", list='["a", "ü"]', item='{"a": [1]}'), "", [called("f", list=["a", "ü"], item={"a": [1]})]),
        (in_tags("f", word="7", level="two"), "", [called("f", word=7, level="two")]),
        (in_tags("f", word='"quoted"', level="1"), "", [called("f", word='"quoted"', level=1)]),
        (in_tags("f", count="many", list="[1,", share="NaN"), "", [called("f", count="many", list="[1,", share="NaN")]),
        ("<tool_call><function=f><parameter=text>a</parameter></function></tool_call>", "", [called("f", text="a")]),
        ("<function=f>\n<parameter=count>\n3\n</parameter>\n</function>\n</tool_call>", "", [called("f", count=3)]),
        ("<tool_call>\n<function=f>\n<parameter=text>\na\n<parameter=count>\n3\n</function>", "",
         [called("f", text="a", count=3)]),
        ("<tool_call>\n<function=f>\n<parameter=text>\na</tool_call> b", "b", [called("f", text="a")]),
        ("<tool_call>\n<function=f>\n<parameter=text>\na\n</parameter>\n</tool_call>.", ".", [called("f", text="a")]),
        (f"<tool_call>{ONE}</tool_call>", "", [F]),
        # cut off
        ("<tool_call>\n<function=f>\n<parameter=text>\nab", "", [ToolCall("f", '{"text": "ab')]),
        ("<tool_call>\n<function=f>\n<parameter=text>\nab\n</para", "", [ToolCall("f", '{"text": "ab\\n</para')]),
        ("<tool_call>\n<function=f>\n<parameter=count>\n12", "", [ToolCall("f", '{"count": ')]),
        ("<tool_call>\n<function=f>", "", [ToolCall("f", "")]),
        # no call
        ("<tool_call>\n<function=", "<tool_call>\n<function=", []),
        ("<tool_call>\n<function=f\n", "<tool_call>\n<function=f\n", []),
        ("<tool_call>f(1)", "<tool_call>f(1)", []),
        (" <function>f</function>", " <function>f</function>", []),
        ("if a<function=3", "if a<function=3", []),
    ],
)  # fmt: skip
def test_calls_in_tags(format: str, text: str, content: str, calls: list[ToolCall]) -> None:
    assert parse_tool_calls(text, format, TYPED) == (content, calls)
    assert pieces(text, format, range(1, len(text)), TYPED) == (content, calls), "character by character"


def pieces(text: str, format: str, cuts: Any, tools: Any = ()) -> tuple[str, list[ToolCall]]:
    """The sum of what comes when the text is cut at these places."""
    parser, content, calls = ToolCallParser(format, tools), "", list[ToolCallDelta]()
    opens = FORMATS[format].opens.strip()
    edges = [0, *sorted(cuts), len(text)]
    for begin, end in pairwise(edges):
        more, found = parser.push(text[begin:end])
        assert not opens or not more.endswith(opens[:-1]), "a part of a tag is no content yet"
        content += more
        calls += found
    rest, found = parser.finish()
    assert parser.finish() == ("", [])
    assert parser.num_whole <= len(joined_calls([*calls, *found]))
    return content + rest, joined_calls([*calls, *found])


FRAGMENTS = [
    ONE, TWO, LLAMA, "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "<|tool_call|>", "<tool",
    "</tool", ";", ",", " ", "\n", "{", "}", "[", "]", '"', "\\", "text", "é", '{"name"', '"}', "<", "|",
    f"<tool_call>{ONE}", "<function=f>", "<function=", "<parameter=text>", "<parameter=count>", "</parameter>",
    "</function>", "[ARGS]", "f", "f[ARGS]{", "5", "<func", "</param", in_tags("f", text="a\nb", count="5"),
]  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=9).map("".join)


@pytest.mark.parametrize("format", FORMATS)
@settings(deadline=None, max_examples=150)
@example(text=f"<tool_call>{ONE}</tool_call>", data=None)
@given(text=texts, data=st.data())
def test_cuts_change_nothing(format: str, text: str, data: st.DataObject | None) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)))) if data else []
    whole = parse_tool_calls(text, format, TYPED)
    assert pieces(text, format, cuts, TYPED) == whole
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
    assert parser.push(f'\n{tag}{{"name": "f", "arguments":') == ("", [])
    assert parser.push(' {"a"') == ("", [ToolCallDelta(0, "f"), ToolCallDelta(0, None, '{"a"')]), "a name is enough"
    assert parser.push(": 1") == ("", [ToolCallDelta(0, None, ": 1")])
    assert parser.push("}") == ("", [ToolCallDelta(0, None, "}")]) and parser.num_whole == 0
    assert parser.push("}") == ("", []) and parser.num_whole == 1


def test_text_in_tags_comes_in_parts() -> None:
    parser = ToolCallParser("qwen3-coder", TYPED)
    assert parser.push("<tool_call>\n<function=f>\n<parameter=text>\nLong ") == (
        "",
        [ToolCallDelta(0, "f"), ToolCallDelta(0, None, '{"text": "Long ')],
    )
    assert parser.push('"text"\n') == ("", [ToolCallDelta(0, None, '\\"text\\"')]), "the line may be the tag's"
    assert parser.push("<") == ("", [])
    assert parser.push("x") == ("", [ToolCallDelta(0, None, "\\n<x")])
    assert parser.push("\n</parameter>\n<parameter=count>\n1")[1][-1].arguments.endswith(', "count": ')
    assert parser.push("2\n</parameter>") == ("", [ToolCallDelta(0, None, "12")]), "a number comes whole"
    assert parser.push("\n</function>") == ("", [ToolCallDelta(0, None, "}")]) and parser.num_whole == 1


def test_a_long_call_in_small_pieces_is_read_once() -> None:
    """Each character is looked at once: a megabyte in pieces takes no minutes."""
    text = f'<tool_call>{{"name": "f", "arguments": {{"a": "{"x" * 200_000}"}}}}</tool_call>'
    content, calls = pieces(text, "hermes", range(3, len(text), 3))
    assert content == "" and len(calls) == 1 and len(calls[0].arguments) == 200_009
    for name in ("text", "list"):
        value = json.dumps(["x" * 200_000])
        content, calls = pieces(in_tags("f", **{name: value}), "qwen3-coder", range(3, len(value), 3), TYPED)
        assert content == "" and json.loads(calls[0].arguments)[name] in (value, ["x" * 200_000])
