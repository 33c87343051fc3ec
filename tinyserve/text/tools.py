"""Tools: OpenAI's list of them checked, the format that a model's chat template teaches, and a grammar that forces it.

Knows text, JSON and OpenAI's names; nothing about tokens or models. How calls are read is `tool_parser`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tinyserve.errors import RequestError
from tinyserve.sampling_params import StructuredOutputs, schema_of
from tinyserve.text.json_schema import resolved, takes_text, with_options


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes a call: a name and arguments.

    opens, closes: what stands before it and behind it, if anything.
    syntax: "json" is an object of both; "xml" is tags for the name and for each parameter; "named" is the name before
        its arguments in JSON.
    between: what stands between two of them.
    arguments: the key of the arguments.
    as_list: all calls are one JSON array, even if there is but one.
    bare: an answer that begins with such JSON is a call, tag or not; only so are calls forced.
    """

    opens: str = ""
    closes: str = ""
    between: str = "\n"
    arguments: str = "arguments"
    as_list: bool = False
    bare: bool = False
    syntax: Literal["json", "xml", "named"] = "json"

    @property
    def tags(self) -> tuple[str, ...]:
        """The texts that mark a call, some of which may be special tokens."""
        inner = ("[CALL_ID]", "[ARGS]") if self.syntax == "named" else ()
        return (self.opens.strip(), self.closes.strip(), *inner)


_XML = ToolFormat("<tool_call>\n", "\n</tool_call>", syntax="xml")
_HERMES = ToolFormat("<tool_call>\n", "\n</tool_call>")
FORMATS = {
    "llama-3": ToolFormat("<|python_tag|>", between="; ", arguments="parameters", bare=True),
    "granite-4": _HERMES,
    "granite-3": ToolFormat("<|tool_call|>", between=", ", as_list=True),
    "hermes": _HERMES,  # Qwen's and SmolLM's, too
    "mistral": ToolFormat("[TOOL_CALLS] ", between=", ", as_list=True),
    "mistral-v11": ToolFormat("[TOOL_CALLS]", between="", syntax="named"),
    "granite-4.2": _XML,
    "qwen3-coder": _XML,
    "json": ToolFormat(bare=True),
}

# What tells the formats apart in a template's text, the most telling first.
_MARKS = (
    ("<parameter=", "qwen3-coder"),
    ("[ARGS]", "mistral-v11"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|tool_call|>", "granite-3"),
    ("<tool_call>", "hermes"),
    ("<|python_tag|>", "llama-3"),
    ("<|start_header_id|>", "llama-3"),
)
_READS_TOOLS = re.compile(r"\{[{%](?:(?![%}]\}).)*\b(?:xml_)?tools\b", re.DOTALL)
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


_VALUE_CLOSES, _XML_CLOSES = "\n</parameter>\n", "</function>"

MAX_TOOLS = 1024  # OpenAI takes 128


def tool_format(template: str | None) -> str | None:
    """The name of the format that a chat template teaches; None if it does not show tools to the model."""
    if not template or not _READS_TOOLS.search(template):
        return None
    found = next((name for mark, name in _MARKS if mark in template), "json")
    granites = {"hermes": "granite-4", "qwen3-coder": "granite-4.2"}
    return granites.get(found, found) if "<|start_of_role|>" in template else found


def format_named(name: str) -> ToolFormat:
    """One of FORMATS; RequestError lists them."""
    if name not in FORMATS:
        raise RequestError(
            f"There is no tool format {name!r:.60}; there are {', '.join(FORMATS)}.", param="tool_format"
        )
    return FORMATS[name]


def checked_tools(tools: Any) -> list[dict[str, Any]]:
    """Tools in OpenAI's form, copied; RequestError says which is malformed, and how."""
    if not isinstance(tools, Sequence) or isinstance(tools, str) or not tools:
        raise RequestError(
            f"tools is {tools!r:.60}; it must be a list of at least one tool, or be left out.", param="tools"
        )
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"There are {len(tools)} tools, and {MAX_TOOLS} are the most.", param="tools")
    checked = [_checked(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    places: dict[str, int] = {}
    for i, tool in enumerate(checked):
        first = places.setdefault(name := tool["function"]["name"], i)
        if first < i:
            raise RequestError(
                f"tools[{i}].function.name is {name!r}, as is that of tools[{first}].",
                param=f"tools[{i}].function.name",
            )
    return checked


def _checked(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping):
        raise RequestError(
            f"{where} is {tool!r:.60}; it must be an object with type 'function' and a function.", param=where
        )
    if tool.get("type", "function") != "function":
        raise RequestError(f"{where}.type is {tool['type']!r:.60}; it must be 'function'.", param=f"{where}.type")
    function = dict(tool["function"])
    where += ".function"
    if not isinstance(function.get("name"), str) or not _NAME.fullmatch(function["name"]):
        raise RequestError(
            f"{where}.name is {function.get('name')!r:.80}; it must be 1 to 64 of a-z, A-Z, 0-9, _, . and -.",
            param=f"{where}.name",
        )
    if not isinstance(function.get("description", ""), str | None):
        raise RequestError(
            f"{where}.description is {function['description']!r:.60}; it must be text.", param=f"{where}.description"
        )
    if function.get("parameters") is not None:
        parameters = function["parameters"] = schema_of(function["parameters"], f"{where}.parameters")
        if parameters.get("type", "object") != "object":
            raise RequestError(
                f"{where}.parameters.type is {parameters['type']!r:.60}; it must be 'object'.",
                param=f"{where}.parameters.type",
            )
    return {"type": "function", "function": function}


def parameters_of(tools: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The schemas of a tool's parameters by name; none where there is no such tool."""
    named = [tool["function"] for tool in tools if tool["function"]["name"] == name]
    schema = (named[0].get("parameters") or {}) if named else {}
    properties = schema.get("properties")
    return {key: resolved(one, schema) for key, one in properties.items()} if isinstance(properties, Mapping) else {}


def chosen_tools(tools: Sequence[Mapping[str, Any]], tool_choice: Any) -> list[Mapping[str, Any]] | None:
    """The tools one of which must be called; None if `tool_choice` ("auto", "none", None) leaves it to the model.

    Raises RequestError for a choice that is none of OpenAI's, or names a tool that is not there.
    """
    if tool_choice in (None, "auto", "none"):
        return None
    if tool_choice == "required":
        return list(tools)
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    if not isinstance(function, Mapping) or tool_choice.get("type", "function") != "function":
        raise RequestError(
            f"tool_choice is {tool_choice!r:.80}; it must be 'none', 'auto', 'required', or an object with type "
            "'function' and the name of a function.",
            param="tool_choice",
        )
    chosen = [tool for tool in tools if tool["function"]["name"] == function.get("name")]
    if not chosen:
        names = ", ".join(tool["function"]["name"] for tool in tools)
        raise RequestError(
            f"tool_choice.function.name is {function.get('name')!r:.80}; the tools are {names}.",
            param="tool_choice.function.name",
        )
    return chosen


def tool_grammar(
    tools: Any,
    tool_choice: Any,
    format: str,
    *,
    parallel_tool_calls: bool = True,
    special_ids: Mapping[str, int] | None = None,
) -> StructuredOutputs | None:
    """What an answer must look like if `tool_choice` asks for calls; None if it does not.

    "required" takes one call or more (one, without `parallel_tool_calls`), a named tool exactly one. `special_ids` are
    the tokenizer's special tokens by name: a tag among them must be that token, and not its letters.
    """
    how = format_named(format)
    chosen = chosen_tools(checked_tools(tools), tool_choice)
    if chosen is None:
        return None
    rules = ["call: " + " | ".join(f"call_{i}" for i in range(len(chosen)))]
    for i, tool in enumerate(chosen):
        rules += _call_rules(i, tool["function"], how, special_ids or {})
    opens, closes = (_literal(tag, special_ids or {}) for tag in (how.opens, how.closes))
    several = parallel_tool_calls and tool_choice == "required"
    one = "call" if how.bare or how.as_list else f"{opens} call {closes}"
    between = json.dumps(how.between) if how.between else ""
    calls = f"{one} ({between} {one})*" if several else one
    start = f'{opens} "[" {calls} "]"' if how.as_list else calls
    return StructuredOutputs(grammar="\n".join([f"start: {start}", *rules]))


def _call_rules(i: int, function: Mapping[str, Any], how: ToolFormat, special_ids: Mapping[str, int]) -> list[str]:
    """The rule call_{i}, and those that it needs, for calls of one function."""
    schema = _arguments(function)
    arguments = f"arguments_{i}: %json {json.dumps(schema)}"
    match how.syntax:
        case "json":
            head = json.dumps(f'{{"name": {json.dumps(function["name"])}, "{how.arguments}": ')
            return [f'call_{i}: {head} arguments_{i} "}}"', arguments]
        case "named":
            return [f"call_{i}: {_literal(function['name'] + '[ARGS]', special_ids)} arguments_{i}", arguments]
    rules, parts = [], [json.dumps(f"<function={function['name']}>\n")]
    for k, (name, one) in enumerate(schema.get("properties", {}).items()):
        parts.append(f"parameter_{i}_{k}" + ("" if name in schema.get("required", ()) else "?"))
        rules += _parameter_rules(f"{i}_{k}", json.dumps(f"<parameter={name}>\n"), one, schema)
    if schema.get("additionalProperties", True):
        parts.append(f"any_{i}*")
        rules.append(f'any_{i}: "<parameter=" /[a-zA-Z0-9_.-]{{1,64}}/ ">\\n" text_{i}')
        rules.append(f"text_{i}[suffix={json.dumps(_VALUE_CLOSES)}]: /(?s:.*)/")
    return [f"call_{i}: {' '.join(parts)} {json.dumps(_XML_CLOSES)}", *rules]


def _parameter_rules(key: str, opens: str, schema: Any, root: Mapping[str, Any]) -> list[str]:
    """The rule parameter_{key}: a text as it is (its pattern or format is left to the model), anything else as JSON."""
    schema = resolved(schema, root)
    values = schema.get("enum") if isinstance(schema, Mapping) else None
    closes = json.dumps(_VALUE_CLOSES)
    if values and all(isinstance(value, str) and value and "\n" not in value for value in values):
        choices = " | ".join(json.dumps(value, ensure_ascii=False) for value in values)
        return [f"parameter_{key}: {opens} ({choices}) {closes}"]
    if takes_text(schema):
        schema = schema if isinstance(schema, Mapping) else {}
        least, most = (schema.get(name) for name in ("minLength", "maxLength"))
        length = f"{{{least or 0},{'' if most is None else most}}}" if least or most is not None else "*"
        return [f"parameter_{key}: {opens} text_{key}", f"text_{key}[suffix={closes}]: /(?s:.{length})/"]
    definitions = {name: root[name] for name in ("$defs", "definitions") if name in root}
    value = json.dumps(with_options({**schema, **definitions}, param="tools"))
    return [f"parameter_{key}: {opens} value_{key} {closes}", f"value_{key}: %json {value}"]


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a call's arguments: a tool that lists its parameters takes no others, unless it says so."""
    schema = {"type": "object", **(function.get("parameters") or {"properties": {}})}
    if not schema.keys() & {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}:
        schema["additionalProperties"] = "properties" not in schema
    return with_options(schema, param="tools")


def _literal(text: str, special_ids: Mapping[str, int]) -> str:
    """Text in Lark, its special tokens by their ids."""
    names = "|".join(map(re.escape, special_ids)) or "(?!)"
    parts = re.split(f"({names})", text)
    return " ".join(f"<[{special_ids[part]}]>" if part in special_ids else json.dumps(part) for part in parts if part)
