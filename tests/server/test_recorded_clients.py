"""What the newest clients really send (tests/data/clients, by scripts/record_clients.py), sent to the server once more.

Each request is answered in the form that OpenAI's own types have, or refused by a sentence that stands here.
"""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import httpx2 as httpx
import jsonschema
import openai
import pytest
from openai.types import CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from servers import Running, running
from tool_templates import HERMES

from tinyserve.server.protocol import IGNORED, ChatBody, CompletionBody, EmbeddingBody

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "clients"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONGEST = 300  # tokens, of an answer to a request that gives no limit

# What is refused on purpose: the status, the sentence, and why it is no more than that.
REFUSED = {
    # Another answer would come of it, so it is not passed over.
    ("openai", "functions"): (400, "function_call is not built: use tool_choice."),
    ("openai", "sound"): (400, "audio is not built: answers are text: leave it out."),
    ("openai", "a web search"): (400, "web_search_options is not built: search yourself, as a tool."),
    ("openai", "moderation"): (400, "moderation is not built: judge texts yourself: leave it out."),
    ("openai", "a completion with an end"): (
        400,
        "suffix is not built: these models only go on with a text: leave it out.",
    ),
    ("openai", "a shorter embedding"): (
        400,
        "dimensions is given, and hidden states cannot be shortened: leave it out.",
    ),
    ("openai", "a picture"): (
        400,
        "messages[0].content[0] is of type 'image_url', but these models read only parts of type 'text'.",
    ),
    # These have a function's place and none of its form: no template here shows such tools.
    ("openai", "custom tools"): (400, "it must be an object with type 'function' and a function."),
    ("openai", "allowed tools"): (400, "it must be 'none', 'auto', 'required', or an object with type 'function'"),
    # Other APIs; their clients speak chat completions as well.
    ("openai", "the Responses API"): (404, "the Responses API is not built: ask /v1/chat/completions"),
    ("pydantic-ai", "the Responses API"): (404, "the Responses API is not built: ask /v1/chat/completions"),
    ("openai", "moderations"): (404, "no model here judges texts: leave it out."),
}


def recorded() -> list[tuple[str, dict[str, Any]]]:
    """The requests, each with the library that sent it."""
    requests = []
    for path in sorted(DATA.glob("*.jsonl")):
        about, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        assert about["library"] == path.stem and about["versions"]
        requests += [(path.stem, line) for line in lines]
    return requests


RECORDED = recorded()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model of random numbers that is shown tools, and whose makers want it greedy and brief."""
    raw = checkpoints.CONFIGS["llama"] | {"max_position_embeddings": 8192}
    folder = checkpoints.write_folder(tmp_path_factory.mktemp("clients"), raw)
    names = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": HERMES}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "max_new_tokens": LONGEST}))
    with running({"tiny": folder}, dtype="float32", num_threads=1, max_num_seqs=4, seed=0) as one:
        yield one
        assert one.metric("tinyserve_cache_blocks_used") == 0


@pytest.mark.parametrize(("library", "asked"), RECORDED, ids=[f"{name}: {one['call']}" for name, one in RECORDED])
def test_what_clients_send_is_answered_in_their_form(server: Running, library: str, asked: dict[str, Any]) -> None:
    path, body = asked["path"], asked.get("body", {})
    with server.client() as client:
        answer = client.request(asked["method"], path, json=asked.get("body"), headers=asked["headers"])
    if (refusal := REFUSED.get((library, asked["call"]))) is not None:
        error = answer.json()["error"]
        assert (answer.status_code, refusal[1] in error["message"]) == (refusal[0], True), error
        return
    assert answer.status_code == 200, answer.text
    passed_over = sorted(name for name in body if name in IGNORED and body[name] not in (None, *IGNORED[name]))
    built = {CHAT: ChatBody, TEXT: CompletionBody, "/v1/embeddings": EmbeddingBody}.get(path)
    passed_over = [name for name in passed_over if built is not None and name not in built.model_fields]
    assert answer.headers.get("x-tinyserve-ignored", "") == ", ".join(passed_over)
    if path == "/v1/models":
        assert [Model.model_validate(card).id for card in answer.json()["data"]] == ["tiny"]
    elif path == "/v1/models/tiny":
        assert Model.model_validate(answer.json()).id == "tiny"
    elif path == "/v1/embeddings":
        _check_embeddings(body, answer)
    elif path == TEXT:
        _check_completion(body, answer)
    else:
        choices = _streamed(body, answer) if body.get("stream") else _whole(body, answer)
        assert [choice["index"] for choice in choices] == list(range(body.get("n") or 1))
        for choice in choices:
            _check_chat(body, choice)


def _whole(body: dict[str, Any], answer: httpx.Response) -> list[dict[str, Any]]:
    typed = ChatCompletion.model_validate_json(answer.text, strict=True)
    assert typed.usage is not None and typed.usage.completion_tokens > 0
    for choice in typed.choices:
        assert (choice.logprobs is not None) == bool(body.get("logprobs"))
        if choice.logprobs is not None:
            assert choice.logprobs.content and len(choice.logprobs.content[0].top_logprobs) == body["top_logprobs"]
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def _events(answer: httpx.Response) -> list[str]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return events


def _streamed(body: dict[str, Any], answer: httpx.Response) -> list[dict[str, Any]]:
    """The choices as they would have come whole."""
    chunks = [ChatCompletionChunk.model_validate_json(event, strict=True) for event in _events(answer)]
    last = chunks[-1]
    if (body.get("stream_options") or {}).get("include_usage"):
        assert last.usage is not None and not last.choices and last.usage.completion_tokens > 0
        chunks.pop()
    assert all(chunk.choices and chunk.id == last.id for chunk in chunks)
    whole: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        if choice.index not in whole:
            assert choice.delta.role == "assistant"
            message: dict[str, Any] = {"content": "", "tool_calls": []}
            whole[choice.index] = {"index": choice.index, "message": message, "finish_reason": None}
        one = whole[choice.index]
        assert one["finish_reason"] is None
        one["finish_reason"] = choice.finish_reason
        one["message"]["content"] += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            calls = one["message"]["tool_calls"]
            assert call.function is not None
            if call.index == len(calls):
                assert call.id and call.type == "function"
                calls.append({"function": {"name": "", "arguments": ""}})
            for name in ("name", "arguments"):
                calls[call.index]["function"][name] += getattr(call.function, name) or ""
    return [whole[index] for index in sorted(whole)]


def _check_chat(body: dict[str, Any], choice: dict[str, Any]) -> None:
    """An answer has an end, and whatever structure was asked for."""
    message, reason = choice["message"], choice["finish_reason"]
    calls = message.get("tool_calls") or []
    assert reason in ("stop", "length", "tool_calls")
    forced = body.get("tool_choice") if body.get("tool_choice") not in (None, "auto", "none") else None
    if forced is not None:
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in body["tools"]}
        # A model of random numbers goes on with calls, or with a list, for as long as it may.
        endless = '"array"' in json.dumps(body["tools"])
        several = forced == "required" and body.get("parallel_tool_calls", True)
        assert calls or endless
        ended = "tool_calls" if forced == "required" else "stop"
        assert reason == ended or (reason == "length" and (endless or several))
        whole = calls[:-1] if reason == "length" else calls  # the last one may be cut off
        for call in whole:
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            assert forced == "required" or name == forced["function"]["name"]
            jsonschema.validate(arguments, schemas[name])
        assert len(calls) == 1 or body.get("parallel_tool_calls", True)
    if "tools" not in body or body.get("tool_choice") == "none":
        assert not calls and isinstance(message["content"], str)
    format = body.get("response_format") or {}
    if format.get("type") == "json_schema":
        assert reason == "stop"
        jsonschema.validate(json.loads(message["content"]), format["json_schema"]["schema"])
    elif format.get("type") == "json_object":
        assert message["content"].startswith("{")
    choices = body.get("guided_choice") or (body.get("structured_outputs") or {}).get("choice")
    assert choices is None or message["content"] in choices


def _as_typed(event: str) -> str:
    """Without the nulls that OpenAI's server sends and its types do not have: no end yet, and nothing before a text."""
    data = json.loads(event)
    for choice in data["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        for name, empty in (("token_logprobs", 0.0), ("top_logprobs", {})):
            if choice["logprobs"] and choice["logprobs"][name][:1] == [None]:
                choice["logprobs"][name][0] = empty
    return json.dumps(data)


def _check_completion(body: dict[str, Any], answer: httpx.Response) -> None:
    events = _events(answer) if body.get("stream") else [answer.text]
    typed = [openai.types.Completion.model_validate_json(event) for event in map(_as_typed, events)]
    choices = [choice for one in typed for choice in one.choices]
    prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
    many = (1 if isinstance(prompts[0], int) else len(prompts)) * (body.get("n") or 1)
    assert {choice.index for choice in choices} == set(range(many))
    if body.get("stream"):
        asks = (body.get("stream_options") or {}).get("include_usage")
        assert (typed[-1].usage is not None) == bool(asks)
        return
    assert len(choices) == many and typed[0].usage is not None
    for choice in choices:
        assert choice.finish_reason in ("stop", "length")
        assert (choice.logprobs is not None) == (body.get("logprobs") is not None)
        assert not body.get("echo") or choice.text.startswith(body["prompt"])


def _check_embeddings(body: dict[str, Any], answer: httpx.Response) -> None:
    given = body["input"]
    many = len(given) if isinstance(given, list) and not isinstance(given[0], int) else 1
    data = answer.json()["data"]
    assert len(data) == many
    if body.get("encoding_format") == "base64":
        assert all(isinstance(one["embedding"], str) for one in data)
    else:
        typed = CreateEmbeddingResponse.model_validate_json(answer.text)
        assert all(sum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-4) for one in typed.data)


# --- what the recordings are worth ------------------------------------------------------------------------------------


def test_every_refusal_was_recorded() -> None:
    assert REFUSED.keys() <= {(library, asked["call"]) for library, asked in RECORDED}


def test_every_library_was_recorded_with_what_it_is_used_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    libraries = importlib.import_module("record_clients").LIBRARIES
    assert {library for library, _ in RECORDED} == set(libraries)
    chats = [(library, one["body"]) for library, one in RECORDED if one["path"] == CHAT]
    for library in libraries.keys() - {"dspy"}:  # which by itself asks in text, and reads text
        mine = [body for name, body in chats if name == library]
        assert any(body.get("stream") for body in mine), library
        assert any(body.get("tool_choice", "auto") != "auto" for body in mine), library
        assert any((body.get("response_format") or {}).get("type") == "json_schema" for body in mine), library
        if library != "instructor":
            assert any(message["role"] == "tool" for body in mine for message in body["messages"]), library


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        ("POST", "/v1/responses/abc", "ask /v1/chat/completions"),
        ("POST", "/v1/messages", "Anthropic's API is not built: ask /v1/chat/completions"),
        ("POST", "/v1/messages/count_tokens", "Anthropic's"),
        ("POST", "/api/chat", "Ollama's API is not built: ask /v1/chat/completions"),
        ("POST", "/completion", "ask /v1/completions"),
        ("POST", "/v1/audio/speech", "answers are text"),
        ("POST", "/chat/completions", "it is at /v1/chat/completions, so a client's base URL ends in /v1."),
        ("GET", "/models", "it is at /v1/models,"),
        (
            "POST",
            "/v1/v1/chat/completions",
            "it is at /v1/chat/completions, so a client's base URL has a /v1 too many.",
        ),
        ("POST", "/v1/tokenize", "it is at /tokenize,"),
        ("GET", "/v1/nothing", "docs/serving.md lists what there is."),
    ],
)
def test_a_path_that_is_not_there_says_where_to_go(server: Running, method: str, path: str, words: str) -> None:
    with server.client() as client:
        answer = client.request(method, path, json={} if method == "POST" else None)
    error = answer.json()["error"]
    assert answer.status_code == 404 and error["code"] == "not_found"
    assert f"There is no {method} {path}: " in error["message"] and words in error["message"]
