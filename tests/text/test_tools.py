"""Tools are checked and shown to the model; a forced answer is a call that the parser reads back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from oracles import Oracle
from refusals import refused
from test_chat_template import SPECIAL
from test_chat_template import TEMPLATES as PLAIN
from test_grammar import allowed, walk
from test_tokenizer import KEY, metadata_of
from tool_templates import SMOLLM3, TEMPLATES

from tinyserve.text.chat_template import ChatTemplate
from tinyserve.text.grammar import GrammarCompiler
from tinyserve.text.tokenizer import Tokenizer
from tinyserve.text.tokenizer.gguf import TokenType
from tinyserve.text.tool_parser import ToolCall, ToolCallDelta, ToolCallParser, joined_calls, parse_tool_calls
from tinyserve.text.tools import FORMATS, checked_tools, tool_format, tool_grammar

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a <place> & a day",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"$ref": "#/$defs/place"},
                "unit": {"enum": ["celsius", "°F"]},
                "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 7}, "maxItems": 3},
            },
            "required": ["place"],
            "$defs": {"place": {"type": "string", "minLength": 1, "maxLength": 12}},
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"place": "Köln"}'}}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in Köln?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": '{"sky": "grey"}'},
]


# --- what templates show ------------------------------------------------------------------------------------------


def test_formats_are_known_by_their_templates() -> None:
    assert {name: tool_format(template) for name, template in TEMPLATES.items()} == {name: name for name in TEMPLATES}
    assert tool_format(SMOLLM3) == "hermes"
    assert tool_format("{% if tools %}{{ '[AVAILABLE_TOOLS]' }}[TOOL_CALLS]{% endif %}") == "mistral"
    assert tool_format("{% for t in tools %}{% endfor %}<|start_of_role|><|tool_call|>") == "granite-3"
    assert tool_format("{{ tools | tojson }}") == "json"


@pytest.mark.parametrize("template", [None, "", PLAIN["smollm2"], "You have tools. {{ messages }} tools {% if x %}"])
def test_a_template_that_does_not_read_tools_has_no_format(template: str | None) -> None:
    assert tool_format(template) is None


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_calls_and_their_results_render_as_in_transformers(name: str, oracle: Oracle) -> None:
    utils = oracle("transformers.utils.chat_template_utils")
    template = ChatTemplate(TEMPLATES[name], SPECIAL, name)
    objects = json.loads(json.dumps(CONVERSATION))
    objects[2]["tool_calls"][0]["function"]["arguments"] = {"place": "Köln"}
    for tools in (None, TOOLS):
        [expected], _ = utils.render_jinja_template(
            [objects], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=True, **SPECIAL
        )
        assert template.render(CONVERSATION, tools=tools) == template.render(objects, tools=tools) == expected
    assert "a <place> & a day" in expected and '"sky' in expected.replace("\\", "")


def test_tools_under_another_name(oracle: Oracle) -> None:
    """SmolLM3's template reads xml_tools; whoever names those, or python_tools, means them."""
    utils = oracle("transformers.utils.chat_template_utils")
    objects = json.loads(json.dumps(CONVERSATION))
    objects[2]["tool_calls"][0]["function"]["arguments"] = {"place": "Köln"}
    for variables in ({"enable_thinking": False}, {}):
        [expected], _ = utils.render_jinja_template(
            [objects], xml_tools=TOOLS, chat_template=SMOLLM3, add_generation_prompt=True, **variables, **SPECIAL
        )
        template = ChatTemplate(SMOLLM3, SPECIAL, "m")
        assert template.render(CONVERSATION, tools=TOOLS, **variables) == expected and "get_weather" in expected
        assert template.render(CONVERSATION, xml_tools=TOOLS, **variables) == expected
        assert "Your tools" in template.render(CONVERSATION, python_tools=TOOLS, **variables)
        assert "Your tools" not in template.render(CONVERSATION, **variables)


CALLS = [
    ToolCall("get_weather", '{"place": "Köln"}'),
    ToolCall("get_weather", '{"place": "a \\"b\\"\\n\\n<c> & d", "days": [1, 2], "unit": "°F"}'),
    ToolCall("now", "{}"),
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("said", ["", "Let me see."])
def test_rendered_calls_are_read_back(name: str, said: str) -> None:
    """What a template writes for earlier calls is what its format's parser reads, whole and cut at every character."""
    for calls in [[call] for call in CALLS] + ([CALLS] if name != "llama-3" else []):
        sent = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in calls]
        message = {"role": "assistant", "content": said, "tool_calls": sent}
        template = ChatTemplate(TEMPLATES[name], SPECIAL, name)
        before = template.render(CONVERSATION[:2], add_generation_prompt=name != "mistral-v11")
        shown = template.render([*CONVERSATION[:2], message], add_generation_prompt=False)
        assert shown.startswith(before)
        answer = shown.removeprefix(before)
        end = min(
            answer.find(mark) % 10**9 for mark in ("<|eot_id|>", "<|end_of_text|>", "<|im_end|>", SPECIAL["eos_token"])
        )
        content = said if name != "llama-3" else ""  # which leaves out what else was said
        assert parse_tool_calls(answer[:end].lstrip("\n"), name, TOOLS) == (content, calls)
        parser, parts, text = ToolCallParser(name, TOOLS), list[ToolCallDelta](), ""
        for letter in answer[:end].lstrip("\n"):
            more, deltas = parser.push(letter)
            text, parts = text + more, parts + deltas
        more, deltas = parser.finish()
        assert (text + more, joined_calls([*parts, *deltas])) == (content, calls)


def test_a_template_may_refuse_two_calls() -> None:
    twice = [*CONVERSATION[:2], {"role": "assistant", "tool_calls": [CALL, CALL]}]
    with refused("messages", "only supports single tool-calls at once"):
        ChatTemplate(TEMPLATES["llama-3"], SPECIAL, "m").render(twice, tools=TOOLS)


@pytest.mark.parametrize(
    ("calls", "where", "sentence"),
    [
        ("f()", "", "tool_calls must be a list of calls, but this is str."),
        (["f"], "[0]", "tool_calls[0] must be an object with a function, but this is str."),
        ([CALL, {"name": "f"}], "[1]", "tool_calls[1] must be an object with a function, but this is dict."),
        (
            [{"function": {"arguments": "{"}}],
            "[0].function.arguments",
            "is '{'; it must be a JSON",
        ),
        (
            [{"function": {"arguments": "[1]"}}],
            "[0].function.arguments",
            "it must be a JSON object, or the text of one.",
        ),
        ([{"function": {"arguments": "0"}}], "[0].function.arguments", "is '0'; it must be a JSON object"),
    ],
)
def test_a_malformed_earlier_call_says_which_and_how(calls: Any, where: str, sentence: str) -> None:
    with refused(f"messages[0].tool_calls{where}", sentence):
        ChatTemplate("", SPECIAL, "m").render([{"role": "assistant", "content": "", "tool_calls": calls}])


# --- what OpenAI's lists may hold ---------------------------------------------------------------------------------


def with_function(**changes: Any) -> list[Any]:
    return [NOW, {"type": "function", "function": {"name": "f", **changes}}]


def test_tools_are_copied() -> None:
    checked = checked_tools(TOOLS)
    assert checked == TOOLS and checked[0]["function"] is not WEATHER["function"]
    assert checked_tools(with_function(parameters='{"type": "object"}'))[1]["function"]["parameters"] == {
        "type": "object"
    }


@pytest.mark.parametrize(
    ("tools", "param", "sentence"),
    [
        ([], "tools", "tools is []; it must be a list of at least one tool, or be left out."),
        ("f", "tools", "tools is 'f'; it must be a list"),
        (NOW, "tools", "it must be a list of at least one tool"),
        (["f"], "tools[0]", "is 'f'; it must be an object with type 'function' and a function."),
        ([NOW, {"type": "function"}], "tools[1]", "is {'type': 'function'}; it must be an object"),
        (
            [{"type": "retrieval", "function": {}}],
            "tools[0].type",
            "tools[0].type is 'retrieval'; it must be 'function'.",
        ),
        ([NOW, NOW], "tools[1].function.name", "is 'now', as is that of tools[0]."),
        (
            with_function(name=""),
            "tools[1].function.name",
            "tools[1].function.name is ''; it must be 1 to 64 of a-z, A-Z, 0-9, _, . and -.",
        ),
        (
            with_function(name="get weather"),
            "tools[1].function.name",
            "tools[1].function.name is 'get weather'; it must be",
        ),
        (with_function(name="x" * 65), "tools[1].function.name", "it must be 1 to 64 of"),
        (with_function(name=None), "tools[1].function.name", "is None; it must be"),
        (
            with_function(description=3),
            "tools[1].function.description",
            "tools[1].function.description is 3; it must be text.",
        ),
        (
            with_function(parameters=3),
            "tools[1].function.parameters",
            "tools[1].function.parameters is 3; it must be a JSON schema: an object.",
        ),
        (with_function(parameters="{"), "tools[1].function.parameters", "is no JSON: "),
        (
            with_function(parameters={"type": "array"}),
            "tools[1].function.parameters.type",
            "tools[1].function.parameters.type is 'array'; it must be",
        ),
    ],
)
def test_a_malformed_tool_says_which_and_how(tools: Any, param: str, sentence: str) -> None:
    with refused(param, sentence):
        checked_tools(tools)


@pytest.mark.parametrize(
    ("choice", "param", "sentence"),
    [
        (
            "always",
            "tool_choice",
            "tool_choice is 'always'; it must be 'none', 'auto', 'required', or an object with type",
        ),
        ({"type": "function"}, "tool_choice", "is {'type': 'function'}; it must be"),
        ({"type": "any", "function": {"name": "now"}}, "tool_choice", "it must be 'none', 'auto', 'required'"),
        (
            {"type": "function", "function": {"name": "later"}},
            "tool_choice.function.name",
            "tool_choice.function.name is 'later'; the tools are get_weather, now.",
        ),
    ],
)
def test_a_choice_that_is_none_is_refused(choice: Any, param: str, sentence: str) -> None:
    with refused(param, sentence):
        tool_grammar(TOOLS, choice, "hermes")


def test_an_unknown_format_lists_the_known_ones() -> None:
    with refused("tool_format", "no tool format 'xml'; there are llama-3, granite-4, granite-3, hermes"):
        tool_grammar(TOOLS, "required", "xml")


# --- forced calls -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiler(smollm2: Path) -> GrammarCompiler:
    from tinyserve.checkpoints.gguf import open_gguf

    tokenizer = Tokenizer.from_gguf(open_gguf(smollm2).metadata, str(smollm2))
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.end_tokens())


def forced(compiler: GrammarCompiler, choice: Any, format: str, seed: int, **options: Any) -> list[ToolCall]:
    """The calls of an answer chosen at random; there must be nothing else in it."""
    spec = tool_grammar(TOOLS, choice, format, **options)
    assert spec is not None
    ids = walk(compiler.compile(spec), seed)
    content, calls = parse_tool_calls(compiler._tokenizer.decode(ids, skip_special_tokens=False), format, TOOLS)
    assert content == "" and calls
    schemas: Mapping[str, Any] = {"get_weather": WEATHER["function"]["parameters"], "now": {"maxProperties": 0}}  # type: ignore[index]
    for call in calls:
        arguments = json.loads(call.arguments)
        jsonschema.validate(arguments, schemas[call.name])
        assert arguments.keys() <= {"place", "unit", "days"}, "a parameter that the tool does not list"
    return calls


@pytest.mark.parametrize("format", FORMATS)
def test_a_forced_answer_is_calls_that_the_tools_take(compiler: GrammarCompiler, format: str) -> None:
    required = [forced(compiler, "required", format, seed) for seed in range(12)]
    assert {call.name for calls in required for call in calls} == {"get_weather", "now"}
    assert max(map(len, required)) > 1
    for seed in range(4):
        assert len(forced(compiler, "required", format, seed, parallel_tool_calls=False)) == 1
        assert [call.name for call in forced(compiler, NAMED, format, seed)] == ["get_weather"]


@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_nothing_is_forced_that_is_not_asked_for(choice: str | None) -> None:
    assert tool_grammar(TOOLS, choice, "hermes") is None


def test_a_tool_may_take_what_it_does_not_list() -> None:
    for parameters in ({"properties": {"a": {}}, "additionalProperties": True}, {"type": "object"}, {"$ref": "#/a"}):
        spec = tool_grammar(with_function(parameters=parameters), "required", "json")
        assert spec is not None and spec.grammar is not None
        rule = next(line for line in spec.grammar.splitlines() if line.startswith("arguments_1"))
        assert '"additionalProperties": false' not in rule


def test_tags_that_are_special_tokens_are_those_tokens() -> None:
    metadata = metadata_of("gpt-2")
    first = len(metadata[KEY + "tokens"])
    tags = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]"]
    metadata[KEY + "tokens"] += tags
    metadata[KEY + "token_type"] += [int(TokenType.CONTROL)] * len(tags)
    tokenizer = Tokenizer.from_gguf(metadata, "gpt-2")
    special_ids = {tag: first + i for i, tag in enumerate(tags)}
    assert set(special_ids.values()) <= tokenizer.special_ids
    end = tokenizer.encode("<|endoftext|>")
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, end)
    for format, token in (("hermes", first), ("granite-4", first), ("mistral", first + 2)):
        spec = tool_grammar(TOOLS, "required", format, special_ids=special_ids)
        assert spec is not None
        grammar = compiler.compile(spec)
        assert allowed(grammar.matcher()) == [token]
        ids = walk(grammar, 1, 3000)
        assert parse_tool_calls(tokenizer.decode(ids, skip_special_tokens=False), format)[1]
        assert (first + 1 in ids) == (format != "mistral")
