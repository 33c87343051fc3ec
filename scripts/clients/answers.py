"""The answers of a server that knows no model: what the API's form asks for, so that each client goes on to its end.

Knows OpenAI's responses; not who asks.
"""

import base64
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

MODEL = "tiny"
TEXT = "Paris is sunny."
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
NUMBERS = [0.6, 0.8]
CARD = {"id": MODEL, "object": "model", "created": 0, "owned_by": "tinyserve"}


def answer(path: str, body: Mapping[str, Any], text: str) -> dict[str, Any] | list[dict[str, Any]]:
    """A whole response, or the events of a stream. `text` is what a message says that has no structure."""
    if path.endswith("/models"):
        return {"object": "list", "data": [CARD]}
    if "/models/" in path:
        return CARD
    if path.endswith("/embeddings"):
        return _embeddings(body)
    if path.endswith("/chat/completions"):
        choices = [_chat(body, text, i) for i in range(body.get("n") or 1)]
        return _chunks(body, choices) if body.get("stream") else _head("chat.completion") | {"choices": choices}
    if path.endswith("/completions"):
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        many = 1 if isinstance(prompts[0], int) else len(prompts)
        choices = [_completion(body, text, i) for i in range(many * (body.get("n") or 1))]
        whole = _head("text_completion") | {"choices": choices}
        return [whole] if body.get("stream") else whole
    return {}


def example(schema: Any, root: Mapping[str, Any] | None = None) -> Any:
    """A value that a schema allows, as far as those of these clients go."""
    root = schema if root is None else root
    if "$ref" in schema:
        return example(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    for key in ("anyOf", "allOf", "oneOf"):
        if key in schema:
            return example(schema[key][0], root)
    match schema.get("type"):
        case "object":
            return {name: example(one, root) for name, one in schema.get("properties", {}).items()}
        case "array":
            return [example(schema.get("items", {}), root)]
        case "integer" | "number":
            return 1
        case "boolean":
            return True
        case "null":
            return None
    return "Paris"


def _head(kind: str) -> dict[str, Any]:
    return {"id": "1", "object": kind, "created": 0, "model": MODEL, "usage": USAGE}


def _chat(body: Mapping[str, Any], text: str, index: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    reason = "stop"
    format = body.get("response_format") or {}
    answered = any(one["role"] == "tool" for one in body["messages"])
    choice = body.get("tool_choice", "auto")
    if body.get("tools") and choice != "none" and not (answered and choice == "auto"):
        functions = [tool.get("function") or {"name": tool["custom"]["name"]} for tool in body["tools"]]
        if isinstance(choice, dict) and "function" in choice:
            functions = [one for one in functions if one["name"] == choice["function"]["name"]]
        message |= {"content": None, "tool_calls": [_call(functions[-1])]}
        reason = "tool_calls"
    elif format.get("type") == "json_schema":
        message["content"] = json.dumps(example(format["json_schema"]["schema"]))
    logprobs = {"content": [{"token": text, "logprob": -0.1, "bytes": [80], "top_logprobs": []}], "refusal": None}
    return {
        "index": index,
        "message": message,
        "finish_reason": reason,
        "logprobs": logprobs if body.get("logprobs") else None,
    }


def _call(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(example(function.get("parameters") or {"type": "object"}))
    return {"id": "call_1", "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _chunks(body: Mapping[str, Any], choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    head = {key: value for key, value in _head("chat.completion.chunk").items() if key != "usage"}
    events = []
    for choice in choices:
        delta = choice["message"]
        if "tool_calls" in delta:
            delta = delta | {"tool_calls": [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]}
        middle = {"index": choice["index"], "delta": delta, "logprobs": choice["logprobs"], "finish_reason": None}
        end = {"index": choice["index"], "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}
        events += [head | {"choices": [middle]}, head | {"choices": [end]}]
    if (body.get("stream_options") or {}).get("include_usage"):
        events.append(head | {"choices": [], "usage": USAGE})
    return events


def _completion(body: Mapping[str, Any], text: str, index: int) -> dict[str, Any]:
    logprobs = None
    if body.get("logprobs") is not None:
        logprobs = {"tokens": [text], "token_logprobs": [-0.1], "top_logprobs": [{text: -0.1}], "text_offset": [0]}
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": "stop"}


def _embeddings(body: Mapping[str, Any]) -> dict[str, Any]:
    given = body["input"]
    many = len(given) if isinstance(given, list) and not isinstance(given[0], int) else 1
    packed = base64.b64encode(struct.pack("<2f", *NUMBERS)).decode()
    value = packed if body.get("encoding_format") == "base64" else NUMBERS
    data = [{"object": "embedding", "index": i, "embedding": value} for i in range(many)]
    return {"object": "list", "data": data, "model": MODEL, "usage": {"prompt_tokens": 3, "total_tokens": 3}}


def events(chunks: list[dict[str, Any]]) -> Iterator[bytes]:
    """A stream's bytes."""
    for chunk in chunks:
        yield b"data: " + json.dumps(chunk).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"
