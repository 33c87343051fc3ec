"""What clients send beside what is needed, and how they read: nulls, fields of other APIs, odd paths and lines."""

import gc
import inspect
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import Running, running

from tinyserve.server import protocol
from tinyserve.server.guards import Admission
from tinyserve.server.protocol import IGNORED, UNBUILT, ChatBody, CompletionBody, parse
from tinyserve.server.sse import dumps

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, tuple[type[protocol.Body], dict[str, Any]]] = {
    CHAT: (ChatBody, {"messages": QUESTION, "max_tokens": 2}),
    TEXT: (CompletionBody, {"prompt": "Hello", "max_tokens": 2}),
    "/v1/embeddings": (protocol.EmbeddingBody, {"input": "Hello"}),
    "/explain": (protocol.ExplainBody, {"prompt": "Hello"}),
    "/tokenize": (protocol.TokenizeBody, {"prompt": "Hello"}),
    "/detokenize": (protocol.DetokenizeBody, {"tokens": [1]}),
    "/apply-template": (protocol.TemplateBody, {"messages": QUESTION}),
}


@pytest.fixture(scope="module")
def server(folder_of: Callable[[str], Path]) -> Iterator[Running]:
    admission = Admission(cors_origins=["https://a.example"])
    with running(
        {"tiny": folder_of("llama")}, 16, admission=admission, dtype="float32", num_threads=1, max_num_seqs=4
    ) as one:
        yield one


# --- null is as left out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", BODIES)
def test_every_field_may_be_null(server: Running, path: str) -> None:
    kind, body = BODIES[path]
    plain = server.post(path, body)
    assert plain.status_code == 200, plain.text
    nothing = dict.fromkeys([*kind.model_fields, *kind.ignored, *kind.unbuilt])
    response = server.post(path, {**nothing, **body})
    assert response.status_code == 200, response.text
    assert "x-tinyserve-ignored" not in response.headers
    for name in sorted(nothing.keys() - body.keys()):
        assert server.post(path, {**body, name: None}).status_code == 200, name


def test_a_field_within_a_field_may_be_null(server: Running) -> None:
    for extra in (
        {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": None}},
        {"response_format": {"type": "text", "json_schema": None}},
        {"response_format": {"type": "json_object", "json_schema": None}},
    ):
        assert server.post(CHAT, {"messages": QUESTION, "max_tokens": 1, **extra}).status_code == 200, extra


def test_what_is_needed_may_not_be_null(server: Running) -> None:
    for path, needed in ((CHAT, "messages"), (TEXT, "prompt"), ("/v1/embeddings", "input"), ("/detokenize", "tokens")):
        error = server.post(path, {**BODIES[path][1], needed: None}).json()["error"]
        assert (error["param"], error["code"]) == (needed, "missing_field")


# --- fields that are not built ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_what_an_answer_is_as_good_without_is_named(
    server: Running, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    extra = {"verbosity": "low", "prediction": {"type": "content", "content": "x"}, "store": False, "user": "me"}
    body = {"messages": QUESTION, "max_tokens": 2, "stream": stream, "temperature": 0}
    server.state.ignored.clear()
    with caplog.at_level(logging.INFO, "tinyserve.server"):
        responses = [server.post(CHAT, {**body, **extra}) for _ in range(3)]
    assert {response.headers["x-tinyserve-ignored"] for response in responses} == {"prediction, verbosity"}
    said = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert len(said) == 2 and all(CHAT in line for line in said)
    if not stream:
        assert responses[0].json()["choices"][0]["message"] == server.post(CHAT, body).json()["choices"][0]["message"]
    # It is named beside an error, too.
    bad = server.post(CHAT, {**body, **extra, "temperature": -1})
    assert bad.status_code == 400 and bad.headers["x-tinyserve-ignored"] == "prediction, verbosity"


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody])
def test_fields_are_ignored_or_refused_and_never_both(kind: type[protocol.Decoding]) -> None:
    assert kind.unbuilt.items() >= UNBUILT.items() and kind.ignored.items() >= IGNORED.items()
    assert not kind.ignored.keys() & kind.unbuilt.keys()
    assert not (kind.ignored.keys() | kind.unbuilt.keys()) & kind.model_fields.keys()
    needed = {"messages": QUESTION} if kind is ChatBody else {"prompt": "a"}
    for name, neutral in kind.ignored.items():
        assert parse(kind, json.dumps({**needed, name: {"any": 1}}).encode())[1] == [name]
        for value in neutral:
            assert parse(kind, json.dumps({**needed, name: value}).encode(), strict=True)[1] == []
        with pytest.raises(protocol.ApiError, match="no field") as caught:
            parse(kind, json.dumps({**needed, name: {"any": 1}}).encode(), strict=True)
        assert caught.value.param == name
    for name, way_out in kind.unbuilt.items():
        with pytest.raises(protocol.ApiError, match="not built") as caught:
            parse(kind, json.dumps({**needed, name: [1]}).encode())
        assert caught.value.param == name and way_out in caught.value.message


LONG = "x" * 5000
CALLABLE = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    "fields",
    [
        {LONG: 1},
        {"stream_options": {LONG: 1}},
        {"structured_outputs": {LONG: 1}},
        {"structured_outputs": {"regex": f"({LONG}"}},
        {"response_format": {"type": LONG}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, LONG: 1}}},
        {"messages": [{"role": "user", "content": [{"type": LONG}]}]},
        {"messages": [{"role": "user", "content": "a", "tool_calls": LONG}]},
        {"tools": [{"type": LONG, "function": {"name": "f"}}]},
        {"tools": CALLABLE, "tool_choice": LONG},
        {"tools": CALLABLE, "tool_choice": {"type": "function", "function": {"name": LONG}}},
        {"chat_template_kwargs": {"messages": LONG}},
        {"logit_bias": {LONG: 1}},
        {"bad_words": [LONG, 3]},
        {"reasoning_effort": [LONG]},
        {"model": LONG},
    ],
)
def test_an_error_does_not_send_back_all_that_was_sent(server: Running, fields: dict[str, Any]) -> None:
    response = server.post(CHAT, {"messages": QUESTION, "max_tokens": 1, **fields})
    error = response.json()["error"]
    assert 400 <= response.status_code < 500 and error["message"].endswith((".", "?"))
    assert len(response.text) < 1000, error


@pytest.mark.parametrize("name", UNBUILT)
def test_what_is_off_asks_for_nothing(server: Running, name: str) -> None:
    for value in (None, False, "", []):
        answer = server.post(CHAT, {**BODIES[CHAT][1], name: value})
        assert answer.status_code == 200 and "x-tinyserve-ignored" not in answer.headers, value
    for value in (True, {}, "a", [{}]):
        error = server.post(CHAT, {**BODIES[CHAT][1], name: value}).json()["error"]
        assert (error["param"], error["code"]) == (name, "unsupported_field"), value


def test_every_parameter_of_openais_client_is_known() -> None:
    client = openai.OpenAI(api_key="none")
    methods = {
        ChatBody: client.chat.completions.create,
        CompletionBody: client.completions.create,
        protocol.EmbeddingBody: client.embeddings.create,
    }
    for kind, method in methods.items():
        names = inspect.signature(method).parameters.keys() - {"extra_headers", "extra_query", "extra_body", "timeout"}
        assert len(names) > 4
        assert not names - kind.model_fields.keys() - kind.ignored.keys() - kind.unbuilt.keys()


@pytest.mark.parametrize(
    ("field", "near"), [("temprature", "temperature"), ("max_token", "max_tokens"), ("top_k_", "top_k"), ("xyz", None)]
)
def test_a_misspelt_field_is_an_error(server: Running, field: str, near: str | None) -> None:
    error = server.post(CHAT, {"messages": QUESTION, field: 1}).json()["error"]
    assert (error["param"], error["code"]) == (field, "unknown_field")
    assert (f"Did you mean {near!r}?" in error["message"]) == (near is not None)


def test_a_strict_server_refuses_what_is_not_built(folder_of: Callable[[str], Path]) -> None:
    with running({"tiny": folder_of("llama")}, app={"strict": True}, dtype="float32", num_threads=1) as server:
        refused = server.post(CHAT, {"messages": QUESTION, "verbosity": "low"})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "verbosity"
        assert server.post(CHAT, {"messages": QUESTION, "max_tokens": 1, "verbosity": None}).status_code == 200


# --- numbers, limits and codes ----------------------------------------------------------------------------------------


def test_any_integer_of_64_bits_is_a_seed(server: Running) -> None:
    body = {"messages": QUESTION, "max_tokens": 4, "temperature": 2.0}

    def answer(seed: int) -> str:
        return str(server.post(CHAT, {**body, "seed": seed}).json()["choices"][0]["message"]["content"])

    for seed in (0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), -2):
        assert answer(seed) == answer(seed)
    assert len({answer(-1) for _ in range(8)}) > 1  # nobody gave one
    for seed in (2**64, -(2**63) - 1):
        error = server.post(CHAT, {**body, "seed": seed}).json()["error"]
        assert error["param"] == "seed" and "64 bits" in error["message"]


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        (CHAT, {"messages": QUESTION, "n": 21}),
        (TEXT, {"prompt": "a", "n": 21}),
        (TEXT, {"prompt": "a", "n": 1, "best_of": 21}),
        (TEXT, {"prompt": ["a"] * 21}),
        (TEXT, {"prompt": ["a"] * 7, "n": 3}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_more_answers_than_may_ever_wait_are_refused_at_once(
    server: Running, path: str, extra: dict[str, Any], stream: bool
) -> None:
    response = server.post(path, {**extra, "max_tokens": 2000, "stream": stream})
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "too_many_answers" and "21" in error["message"]
    assert server.state.pool.default.num_open == 0


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a" * 3000}]}, "messages"),
        (TEXT, {"prompt": "a" * 3000}, "prompt"),
        (TEXT, {"prompt": [1] * 3000}, "prompt"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_has_a_code(
    server: Running, path: str, body: dict[str, Any], param: str, stream: bool
) -> None:
    response = server.post(path, {**body, "stream": stream})
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)


@pytest.mark.parametrize("prompt", ["a " * 60_000, [5] * 60_000])
@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_prompt_is_let_go_of(server: Running, prompt: Any, stream: bool) -> None:
    """Although nobody looks for cycles."""

    def long_lists() -> set[int]:
        return {id(one) for one in gc.get_objects() if isinstance(one, list) and len(one) >= 50_000}

    gc.collect()
    gc.disable()
    try:
        before = long_lists()
        for path, field in (
            (TEXT, {"prompt": prompt}),
            (CHAT, {"messages": [{"role": "user", "content": "a" * 60_000}]}),
        ):
            assert server.post(path, {**field, "stream": stream}).status_code == 400
        assert not long_lists() - before
    finally:
        gc.enable()


def test_a_long_prompt_of_ids_is_one_prompt(folder_of: Callable[[str], Path]) -> None:
    with running({"tiny": folder_of("llama")}, dtype="float32", num_threads=1) as server:
        limit = server.post("/tokenize", {"prompt": "a"}).json()["max_model_len"]
        ids = [i % 50 for i in range(limit - 2)]
        answer = server.post(TEXT, {"prompt": ids, "max_tokens": 1})
        assert answer.json()["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {f"k{i}": 1 for i in range(300_000)}),
        (CHAT, {"messages": QUESTION * 140_000}),
        (TEXT, {"prompt": "a", "logit_bias": {str(i): 1 for i in range(300_000)}}),
        ("/detokenize", {"tokens": [1] * 300_000}),
    ],
)
def test_more_values_than_a_loop_has_time_for_are_refused(server: Running, path: str, body: dict[str, Any]) -> None:
    error = server.post(path, body).json()["error"]
    assert error["code"] == "body_too_large" and "262144" in error["message"]


# --- paths, origins and lines -----------------------------------------------------------------------------------------


def test_slashes_that_clients_join_do_not_matter(server: Running) -> None:
    body = {"messages": QUESTION, "max_tokens": 1}
    for path in (f"{CHAT}/", "/v1//chat/completions", f"{server.url}//v1/chat//completions//"):
        assert server.post(path, body).status_code == 200, path
    assert server.get("/v1/models/").json() == server.get("/v1/models").json()
    assert server.get("/v1/models/tiny/").json()["id"] == "tiny"
    assert server.get("/health/").status_code == 200


@pytest.mark.parametrize("private", [False, True])
def test_a_page_that_is_let_in_may_call_this_machine(server: Running, private: bool) -> None:
    headers = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    if private:
        headers["access-control-request-private-network"] = "true"
    with server.client() as client:
        asked = client.options(CHAT, headers={"origin": "https://a.example", **headers})
        other = client.options(CHAT, headers={"origin": "https://b.example", **headers})
    assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "https://a.example"
    assert asked.headers.get("access-control-allow-private-network") == ("true" if private else None)
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("extra", [{}, {"logprobs": True}, {"n": 3, "temperature": 1}, {"stop": ["e"]}])
def test_the_end_of_a_stream_has_no_text(server: Running, extra: dict[str, Any]) -> None:
    body = {"messages": QUESTION, "max_tokens": 5, "temperature": 0, "seed": 1, **extra}
    events = [
        json.loads(line.removeprefix("data: "))
        for line in server.post(CHAT, {**body, "stream": True}).text.split("\n")
        if line.startswith("data: {")
    ]
    choices = [event["choices"][0] for event in events]
    ends = [choice for choice in choices if choice["finish_reason"] is not None]
    assert len(ends) == extra.get("n", 1) and all(end["delta"] == {} and end["logprobs"] is None for end in ends)
    for whole in server.post(CHAT, body).json()["choices"]:
        mine = [choice for choice in choices if choice["index"] == whole["index"]]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == whole["message"]["content"]
        assert mine[-1]["finish_reason"] == whole["finish_reason"]
        if extra.get("logprobs"):
            tokens = [token for choice in mine if choice["logprobs"] for token in choice["logprobs"]["content"]]
            assert tokens == whole["logprobs"]["content"]


@pytest.mark.parametrize("end", "\u0085\u2028\u2029\x0b\x0c\x1c\x1d\x1e\r\n")
def test_json_is_one_line_to_everybody(end: str) -> None:
    data = {f"a{end}b": f"ü{end}"}
    assert len(dumps(data).decode().splitlines()) == 1
    assert json.loads(dumps(data)) == data


def test_offsets_are_characters_of_the_text(server: Running) -> None:
    """Tokens of bytes make up a character together: none counts it twice."""
    prompt = "a→é🙂 b"
    for extra in ({}, {"stream": True}, {"echo": True}):
        response = server.post(
            TEXT, {"prompt": prompt, "max_tokens": 24, "temperature": 3.0, "seed": 3, "logprobs": 0, **extra}
        )
        if extra.get("stream"):
            choices = [
                json.loads(line.removeprefix("data: "))["choices"][0]
                for line in response.text.split("\n")
                if line.startswith("data: {")
            ]
            text = "".join(choice["text"] for choice in choices)
            offsets = [at for choice in choices if choice["logprobs"] for at in choice["logprobs"]["text_offset"]]
        else:
            choice = response.json()["choices"][0]
            text, offsets = choice["text"], choice["logprobs"]["text_offset"]
        assert offsets[0] == 0 and offsets == sorted(offsets) and offsets[-1] <= len(text)
        if "echo" in extra:
            assert text.startswith(prompt)
            parts = zip(offsets, choice["logprobs"]["tokens"], strict=True)
            inside = [(at, token) for at, token in parts if at < len(prompt) and "\ufffd" not in token]
            assert inside and all(prompt[at:].startswith(token) for at, token in inside)
