"""The server as its clients see it, on SmolLM2 and tiny models: OpenAI's own client, plain HTTP, many at once."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import checkpoints
import httpx2 as httpx
import numpy as np
import openai
import pytest
import tokenizers
from hold import hold
from pydantic import BaseModel
from servers import Running, running
from tokenizers.processors import TemplateProcessing
from tool_templates import HERMES

from tinyserve import LLM, SamplingParams
from tinyserve.server.guards import Admission
from tinyserve.text.chat_template import ChatTemplate

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
        },
    },
}


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[Running]:
    """The default model, served."""
    with running({"smollm2-135m": smollm2}, max_model_len=2048, max_num_seqs=8, seed=0) as one:
        yield one
        assert one.metric("tinyserve_cache_blocks_used") == 0


@pytest.fixture(scope="module")
def tiny(folder_of: Callable[[str], Path]) -> Iterator[Running]:
    """A hybrid of a few thousand numbers."""
    with running({"tiny": folder_of("granite-hybrid")}, dtype="float32", num_threads=1, max_num_seqs=4) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


# --- OpenAI's client ------------------------------------------------------------------------------------------------


def ask(client: openai.OpenAI, **options: Any) -> Any:
    defaults = {"model": "smollm2-135m", "messages": QUESTION, "temperature": 0, "max_tokens": 16}
    return client.chat.completions.create(**defaults | options)


def test_chat_answers_and_counts(client: openai.OpenAI) -> None:
    first = ask(client)
    again = ask(client)
    assert "Paris" in first.choices[0].message.content
    assert first.choices[0].finish_reason == "stop" and first.choices[0].message.role == "assistant"
    assert again.choices[0].message.content == first.choices[0].message.content
    assert again.usage.prompt_tokens == first.usage.prompt_tokens == 37
    assert again.usage.prompt_tokens_details.cached_tokens >= 16
    assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens


def test_a_stream_has_the_same_text(client: openai.OpenAI) -> None:
    whole = ask(client, max_tokens=40)
    chunks = list(ask(client, max_tokens=40, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert not chunks[-1].choices and chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert len({chunk.id for chunk in chunks}) == 1


def test_logprobs_are_the_engines(client: openai.OpenAI, server: Running) -> None:
    whole = ask(client, logprobs=True, top_logprobs=3, max_tokens=4)
    llm = server.engine.llm
    prompt = llm.chat_prompt(QUESTION)
    expected = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=4, logprobs=3))[0].outputs[0]
    content = whole.choices[0].logprobs.content
    assert expected.logprobs is not None and llm.tokenizer is not None
    for token, row, got in zip(expected.token_ids, expected.logprobs, content, strict=True):
        assert got.logprob == pytest.approx(float(row[token]), abs=1e-6)
        assert bytes(got.bytes) == llm.tokenizer.token_bytes(token, skip_special_tokens=False)
        assert [top.logprob for top in got.top_logprobs] == sorted(
            (top.logprob for top in got.top_logprobs), reverse=True
        )
        assert len(got.top_logprobs) == 3 and got.top_logprobs[0].token == got.token
    streamed = [c for c in ask(client, logprobs=True, top_logprobs=3, max_tokens=4, stream=True) if c.choices]
    assert [t for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.content] == content


def test_several_answers_and_seeds(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "n": 3, "seed": 7, "max_tokens": 12}
    first, again = ask(client, **options), ask(client, **options)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in first.choices] == [0, 1, 2]
    pieces = ["", "", ""]
    for chunk in ask(client, stream=True, **options):
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
    assert pieces == texts


class City(BaseModel):
    name: str
    country: Literal["France", "Spain"]
    inhabitants: int


def test_pydantic_gets_its_model(client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(
        model="smollm2-135m",
        messages=QUESTION,
        response_format=City,
        max_tokens=128,
        temperature=0,  # type: ignore[arg-type]
    )
    assert isinstance(completion.choices[0].message.parsed, City)


@pytest.mark.parametrize(
    ("extra", "allowed"),
    [
        ({"guided_choice": ["yes", "no"]}, {"yes", "no"}),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, {"red", "blue"}),
        ({"guided_regex": "[ab]{3}"}, {a + b + c for a in "ab" for b in "ab" for c in "ab"}),
        ({"guided_grammar": 'start: "x" | "y"'}, {"x", "y"}),
    ],
)
def test_structures_by_vllms_names(client: openai.OpenAI, extra: dict[str, Any], allowed: set[str]) -> None:
    assert ask(client, extra_body=extra).choices[0].message.content in allowed


def test_a_json_object(client: openai.OpenAI, server: Running) -> None:
    """A bias for what closes an object, as this model finds no end by itself; the grammar has it opened first."""
    assert server.engine.llm.tokenizer is not None
    closing = {str(token): 100 for text in ("}", "}}", '"}') for token in server.engine.llm.tokenizer.encode(text)}
    answer = ask(client, response_format={"type": "json_object"}, logit_bias=closing).choices[0]
    assert answer.finish_reason == "stop"
    assert isinstance(json.loads(answer.message.content), dict)


@pytest.fixture(scope="module")
def tool_client(smollm2: Path) -> Iterator[openai.OpenAI]:
    """SmolLM2 with a template that shows it tools, as its own does not."""
    with running({"smollm2-135m": smollm2}, max_model_len=2048, max_num_seqs=2) as one:
        one.engine.llm.chat_template = ChatTemplate(HERMES, {}, "hermes")
        yield openai.OpenAI(base_url=f"{one.url}/v1", api_key="none", max_retries=0)


def test_tools_are_called(tool_client: openai.OpenAI) -> None:
    client = tool_client
    forced = ask(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=64)
    (call,) = forced.choices[0].message.tool_calls
    assert call.function.name == "get_weather" and forced.choices[0].finish_reason == "tool_calls"
    assert set(json.loads(call.function.arguments)) == {"city", "unit"}
    assert json.loads(call.function.arguments)["unit"] in ("celsius", "fahrenheit")
    streamed = list(
        ask(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=64, stream=True)
    )
    first, *parts = [c for chunk in streamed for choice in chunk.choices for c in choice.delta.tool_calls or []]
    assert (first.index, first.function.name, first.function.arguments, first.type) == (
        0,
        "get_weather",
        "",
        "function",
    )
    assert first.id and len(parts) > 3, "the arguments come as they are written"
    assert {(part.index, part.id, part.function.name) for part in parts} == {(0, None, None)}
    assert "".join(part.function.arguments for part in parts) == call.function.arguments
    with client.chat.completions.stream(
        model="smollm2-135m", messages=QUESTION, temperature=0, tools=[WEATHER], tool_choice="required",
        parallel_tool_calls=False, max_tokens=64,
    ) as stream:  # fmt: skip
        (put_together,) = stream.get_final_completion().choices[0].message.tool_calls
    assert put_together.function.arguments == call.function.arguments
    conversation = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert ask(client, messages=conversation, tools=[WEATHER], tool_choice="none").choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="required") as refused:
        ask(client, tools=[WEATHER], tool_choice="always")
    assert refused.value.param == "tool_choice"


def test_calls_have_ids_that_the_template_takes_back(tmp_path: Path) -> None:
    raw = checkpoints.CONFIGS["llama"] | {"max_position_embeddings": 2048}
    folder = checkpoints.write_folder(tmp_path, raw)
    template = (
        "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.tool_calls %}"
        "[TOOL_CALLS] {% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('9 letters') }}"
        "{% endif %}{{ c.function | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eos|>", "chat_template": template}))
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    named = {"type": "function", "function": {"name": "now"}}
    with running({"tiny": folder}, dtype="float32", num_threads=1, max_num_seqs=2) as tiny:
        body = {"messages": QUESTION, "tools": [tool], "temperature": 0, "max_tokens": 200}
        message = tiny.post(CHAT, {**body, "tool_choice": named}).json()["choices"][0]["message"]
        (call,) = message["tool_calls"]
        assert len(call["id"]) == 9 and call["id"].isalnum()
        result = {"role": "tool", "tool_call_id": call["id"], "content": "noon"}
        again = tiny.post(CHAT, {**body, "messages": [*QUESTION, message, result], "max_tokens": 2})
        assert again.status_code == 200, again.text


def test_a_template_that_shows_no_tools_needs_a_format(folder_of: Callable[[str], Path]) -> None:
    unit = {"type": "object", "properties": {"unit": {"enum": ["c", "f"]}}, "required": ["unit"]}
    tools = [{"type": "function", "function": {"name": "heat", "parameters": unit}}]
    body = {"messages": [{"role": "user", "content": "a"}], "tools": tools, "tool_choice": "required"}
    options: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 2}
    with running({"tiny": folder_of("llama")}, **options) as server:
        error = server.post(CHAT, body).json()["error"]
        assert error["param"] == "tools" and "tool_format" in error["message"]
    with running({"tiny": folder_of("llama")}, app={"tool_format": "json"}, **options) as server:
        answer = server.post(CHAT, {**body, "parallel_tool_calls": False}).json()
        (call,) = answer["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "heat" and json.loads(call["function"]["arguments"])["unit"] in "cf"


def test_completions_echo_and_log_probabilities(client: openai.OpenAI, server: Running) -> None:
    text = "The capital of France is"
    completion = client.completions.create(
        model="smollm2-135m", prompt=text, max_tokens=3, temperature=0, echo=True, logprobs=2
    )
    choice = completion.choices[0]
    assert choice.text.startswith(text) and "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.text_offset[1] == len(choice.logprobs.tokens[0])
    llm = server.engine.llm
    logits = llm.logits(text).astype(np.float64)
    expected = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(text)
    for i, token in enumerate(ids[1:]):
        assert choice.logprobs.token_logprobs[i + 1] == pytest.approx(expected[i, token], abs=1e-4)
    scored = client.completions.create(model="smollm2-135m", prompt=ids, max_tokens=0, echo=True, logprobs=2)
    assert scored.choices[0].text == text and scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs == choice.logprobs.token_logprobs[: len(ids)]


def test_completions_of_several_prompts_keep_their_order(client: openai.OpenAI, server: Running) -> None:
    prompts = ["One, two, three,", "The colour of grass is", "Once upon a time"]
    options: dict[str, Any] = {"model": "smollm2-135m", "max_tokens": 8, "temperature": 0, "n": 2}
    whole = client.completions.create(prompt=prompts, **options)
    alone = server.engine.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8))
    assert [choice.text for choice in whole.choices] == [o.outputs[0].text for o in alone for _ in range(2)]
    pieces = [""] * 6
    for chunk in client.completions.create(prompt=prompts, stream=True, **options):
        for choice in chunk.choices:
            pieces[choice.index] += choice.text
    assert pieces == [choice.text for choice in whole.choices]


def test_many_clients_get_what_each_would_get_alone(server: Running) -> None:
    """Twenty-four at once through eight places, a third of which go away: none of the others notices."""
    prompts = [f"Count from {i} to {i + 10}: {i}," for i in range(24)]
    alone = server.engine.llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24))

    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        stream = await client.completions.create(
            model="smollm2-135m", prompt=prompts[i], max_tokens=24, temperature=0, stream=True
        )
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].text
            if i % 3 == 0 and len(text) > 4:
                await stream.close()
                return ""
        return text

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(24)))

    got = asyncio.run(main())
    assert [text for i, text in enumerate(got) if i % 3] == [o.outputs[0].text for i, o in enumerate(alone) if i % 3]
    wait_until(lambda: server.metric("tinyserve_cache_blocks_used") == 0)
    assert server.metric("tinyserve_requests_running") == server.metric("tinyserve_requests_waiting") == 0


def test_embeddings_are_mean_pooled_hidden_states(client: openai.OpenAI, server: Running) -> None:
    texts = ["A cat sat on the mat.", "Stocks fell."]
    got = client.embeddings.create(model="smollm2-135m", input=texts)  # base64, decoded by the client
    plain = client.embeddings.create(model="smollm2-135m", input=texts, encoding_format="float")
    expected = server.engine.llm.embed(texts)
    for i, one in enumerate(expected):
        np.testing.assert_allclose(got.data[i].embedding, one.embedding, rtol=1e-6)
        np.testing.assert_allclose(plain.data[i].embedding, one.embedding, rtol=1e-6)
    assert got.usage.prompt_tokens == sum(len(one.prompt_token_ids) for one in expected)


# --- other paths ----------------------------------------------------------------------------------------------------


def test_models_tokens_and_templates(server: Running) -> None:
    (card,) = server.get("/v1/models").json()["data"]
    assert card["id"] == "smollm2-135m" and card["loaded"] and card["chat"] and card["max_model_len"] == 2048
    assert server.get("/v1/models/smollm2-135m").json() == card
    tokens = server.post("/tokenize", {"prompt": "Hello wörld", "return_token_strs": True}).json()
    assert server.engine.llm.tokenizer is not None
    assert tokens["tokens"] == server.engine.llm.tokenizer.encode("Hello wörld")
    assert tokens["token_strs"][0] == "Hello" and len(tokens["token_strs"]) == len(tokens["tokens"]) == tokens["count"]
    assert server.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "Hello wörld"}
    rendered = server.post("/apply-template", {"messages": QUESTION}).json()["prompt"]
    assert rendered.endswith("<|im_start|>assistant\n") and "capital of France" in rendered
    as_chat = server.post("/tokenize", {"messages": QUESTION}).json()["tokens"]
    assert as_chat == server.engine.llm.chat_prompt(QUESTION)


ANSWERED = [*QUESTION, {"role": "assistant", "content": "It is Par"}]


def test_a_last_message_is_continued(server: Running) -> None:
    options = {"messages": ANSWERED, "add_generation_prompt": False, "continue_final_message": True}
    prompt = server.post("/apply-template", options).json()["prompt"]
    assert prompt.endswith("<|im_start|>assistant\nIt is Par")
    tokens = server.post("/tokenize", options).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json()["prompt"] == prompt
    answer = server.post(CHAT, {**options, "max_tokens": 2, "temperature": 0}).json()
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    same = server.post(TEXT, {"prompt": prompt, "max_tokens": 2, "temperature": 0}).json()
    assert answer["choices"][0]["message"]["content"] == same["choices"][0]["text"]
    for extra in ({"add_generation_prompt": True}, {"continue_final_message": None}):
        status = server.post(CHAT, {**options, **extra, "max_tokens": 1}).status_code
        assert status == (400 if "add_generation_prompt" in extra else 200)


def test_template_variables_reach_every_path(server: Running) -> None:
    extra = {"messages": QUESTION, "chat_template_kwargs": {"bos_token": "<x>"}}
    for path, more in (("/apply-template", {}), ("/tokenize", {}), (CHAT, {"max_tokens": 3})):
        assert server.post(path, extra | more).status_code == 200


def test_a_prompt_has_one_bos_and_none_where_none_is_wanted(tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path, checkpoints.CONFIGS["llama"])
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", checkpoints.BOS)])
    backend.save(str(folder / "tokenizer.json"))
    with running({"tiny": folder}, dtype="float32", num_threads=1, max_num_seqs=2) as tiny:

        def count(path: str, **body: Any) -> int:
            answer = tiny.post(path, body | ({} if path == "/tokenize" else {"max_tokens": 1})).json()
            return answer["count"] if path == "/tokenize" else answer["usage"]["prompt_tokens"]

        rendered = tiny.post("/apply-template", {"messages": QUESTION}).json()["prompt"]
        assert rendered.startswith("<|bos|>")
        wanted = count(CHAT, messages=QUESTION)
        for path in (TEXT, "/tokenize"):
            for add in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}, {"add_special_tokens": None}):
                assert count(path, prompt=rendered, **add) == wanted
                assert count(path, prompt="abc", **add) == 4 - (add.get("add_special_tokens") is False)
        for path in (CHAT, "/tokenize"):
            for add in (True, False, None):
                assert count(path, messages=QUESTION, add_special_tokens=add) == wanted
        streamed = tiny.post(TEXT, {"prompt": rendered, "add_special_tokens": False, "stream": True, "max_tokens": 1})
        assert streamed.status_code == 200


def test_health_stats_and_layers(server: Running) -> None:
    assert server.get("/health").status_code == server.get("/ready").status_code == 200
    stats = server.get("/stats").json()["models"]["smollm2-135m"]
    assert stats["num_blocks"] == server.engine.stats().num_blocks and stats["cache_bytes"] > 0
    report = server.get("/inspect?model=smollm2-135m").json()
    assert report["layer_types"] == ["attention"] * 30 and report["parameters"] == 134515008
    page = server.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "<script" in page.text and "script-src 'sha256-" in page.headers["content-security-policy"]


def test_metrics_count_what_was_done(tiny: Running) -> None:
    before = tiny.metric("tinyserve_output_tokens_total")
    body = {"prompt": "ab" * 20, "max_tokens": 5, "ignore_eos": True}
    assert tiny.post("/v1/completions", body).json()["usage"]["completion_tokens"] == 5
    assert tiny.metric("tinyserve_output_tokens_total") == before + 5
    assert tiny.metric("tinyserve_time_to_first_token_seconds_count") >= 1
    assert tiny.metric("tinyserve_inter_token_seconds_count") >= 4
    assert tiny.metric("tinyserve_step_seconds_count") >= 5
    text = tiny.get("/metrics").text
    assert 'tinyserve_answers_total{finish_reason="length",model="tiny"}' in text
    assert 'tinyserve_http_responses_total{path="/v1/completions",status="200"}' in text


def test_progress_is_told_while_a_long_prompt_is_read(folder_of: Callable[[str], Path]) -> None:
    options: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "max_num_batched_tokens": 16, "max_num_seqs": 2}
    with running({"tiny": folder_of("llama")}, **options) as server, server.client() as client:
        body = {"prompt": [5] * 100, "max_tokens": 2, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = [line for line in response.iter_lines() if line]
    comments = [line for line in lines if line.startswith(":")]
    assert comments[:2] == [": prefill 16/100", ": prefill 32/100"] and lines[-1] == "data: [DONE]"
    assert lines.index(comments[-1]) < next(i for i, line in enumerate(lines) if line.startswith("data:"))


# --- refusals -------------------------------------------------------------------------------------------------------

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BAD_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (CHAT, {"messages": QUESTION, "temprature": 1}, "temprature", "Did you mean 'temperature'?"),
        (CHAT, {}, "messages", "is missing"),
        (CHAT, {"messages": QUESTION, "temperature": "hot"}, "temperature", "valid number"),
        (CHAT, {"messages": QUESTION, "temperature": -1}, "temperature", "at least 0"),
        (CHAT, {"messages": QUESTION, "max_tokens": True}, "max_tokens", "valid integer"),
        (CHAT, {"messages": QUESTION, "max_tokens": 0}, "max_tokens", "at least 1"),
        (CHAT, {"messages": QUESTION, "max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
        (CHAT, {"messages": QUESTION, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "give one"),
        (CHAT, {"messages": QUESTION, "top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        (
            CHAT,
            {"messages": QUESTION, "logprobs": True, "top_logprobs": 99},
            "top_logprobs",
            "less than or equal to 20",
        ),
        (CHAT, {"messages": QUESTION, "stop": 3}, "stop", "valid string"),
        (CHAT, {"messages": QUESTION, "stop": ["a", 3]}, "stop[1]", "valid string"),
        (CHAT, {"messages": QUESTION, "logit_bias": {"1": 1000}}, "logit_bias", "between -100 and 100"),
        (CHAT, {"messages": QUESTION, "logit_bias": {"99999": 1}}, "logit_bias", "49151"),
        (CHAT, {"messages": QUESTION, "stream_options": {"usage": True}}, "stream_options.usage", "no field"),
        (CHAT, {"messages": QUESTION, "response_format": {"type": "xml"}}, "response_format", "json_schema"),
        (CHAT, {"messages": QUESTION, "structured_outputs": {"choise": ["a"]}}, "structured_outputs", "'choice'"),
        (CHAT, {"messages": QUESTION, "guided_regex": "("}, "guided_regex", "regex"),
        (CHAT, {"messages": QUESTION, "guided_grammar": "start: nothing"}, "guided_grammar", "nothing"),
        (CHAT, {"messages": QUESTION, "guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "one structure"),
        (CHAT, {"messages": QUESTION, "tools": [{"type": "function"}]}, "tools[0]", "function"),
        (CHAT, {"messages": QUESTION, "tools": [WEATHER]}, "tools", "does not show tools"),
        (CHAT, {"messages": []}, "messages", "no messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "text"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            "image_url",
        ),
        (
            CHAT,
            {"messages": QUESTION, "chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs.tools",
            "leave it out",
        ),
        (
            "/apply-template",
            {"messages": QUESTION, "chat_template_kwargs": {"messages": []}},
            "chat_template_kwargs.messages",
            "leave it out",
        ),
        (CHAT, {"messages": QUESTION, "continue_final_message": True}, "continue_final_message", "both true"),
        *(
            (
                path,
                {"messages": QUESTION, "chat_template_kwargs": {name: value}},
                f"chat_template_kwargs.{name}",
                "given",
            )
            for path in (CHAT, "/apply-template", "/tokenize")
            for name, value in {"self": 1, "sampling_params": 1, "add_generation_prompt": False, "stop": "a"}.items()
        ),
        (TEXT, {"prompt": "a", "suffix": "b"}, "suffix", "leave it out"),
        (TEXT, {"prompt": {"a": 1}}, "prompt", "list of token ids"),
        (TEXT, {"prompt": []}, "prompt", "must be a text"),
        (TEXT, {"prompt": ""}, "prompt", "empty"),
        (TEXT, {"prompt": [1, 99999]}, "prompt", "99999"),
        (TEXT, {"prompt": "word " * 3000}, "prompt", "2048"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 3000}]}, "messages", "2048"),
        (CHAT, {"messages": QUESTION, "response_format": BAD_SCHEMA}, "response_format", "objekt"),
        (CHAT, {"messages": QUESTION, "structured_outputs": {"regex": "("}}, "structured_outputs", "regex"),
        ("/v1/embeddings", {"input": "word " * 3000}, "input", "2048"),
        (TEXT, {"prompt": "a", "n": 2, "best_of": 1}, "best_of", "at least as many"),
        ("/v1/embeddings", {"input": "a", "dimensions": 3}, "dimensions", "shortened"),
        ("/v1/embeddings", {"input": 3}, "input", "must be a text"),
        ("/tokenize", {}, "prompt", "one of the two"),
        ("/tokenize", {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "int"),
        ("/apply-template", {"messages": [{"content": "a"}]}, "messages[0].role", "role"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]", "vocabulary"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_name_the_field(
    server: Running, path: str, body: dict[str, Any], param: str | None, words: str, stream: bool
) -> None:
    response = server.post(path, {**body, "stream": True} if stream and path in (CHAT, TEXT) else body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert words in error["message"] and error["param"] == param, error
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"a"', b"null", b"\xff", b'{"prompt": "a"', b"[" * 10000, rb'{"prompt": "\ud800"}']
)
def test_what_is_no_json_object_is_refused(server: Running, body: bytes) -> None:
    with server.client() as client:
        response = client.post(TEXT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and "JSON" in response.json()["error"]["message"]


def test_paths_methods_types_and_models(server: Running) -> None:
    assert server.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert server.get(CHAT).status_code == 405
    unknown = server.post(CHAT, {"messages": QUESTION, "model": "gpt-9"})
    assert unknown.status_code == 404 and "smollm2-135m" in unknown.json()["error"]["message"]
    with server.client() as client:  # what a form on somebody else's page could send
        response = client.post(CHAT, content=json.dumps({"messages": QUESTION}), headers={"content-type": "text/plain"})
    assert response.status_code == 415


def test_keys_hosts_and_sizes(folder_of: Callable[[str], Path]) -> None:
    admission = Admission(
        api_keys=["first", "second"], hosts=["127.0.0.1"], max_body=1000, cors_origins=["https://a.example"]
    )
    with running({"tiny": folder_of("llama")}, admission=admission, dtype="float32", num_threads=1) as server:
        body = {"prompt": "a", "max_tokens": 1}
        for key in ("", "Bearer", "Bearer wrong", "Basic first", "first", "Bearer first second"):
            refused = server.post(TEXT, body, authorization=key)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
            assert refused.headers["www-authenticate"] == "Bearer"
        assert server.post(TEXT, body, authorization="Bearer second").status_code == 200
        assert server.get("/metrics").status_code == server.get("/stats").status_code == 401
        assert server.get("/").status_code == server.get("/health").status_code == 200
        auth = {"authorization": "Bearer first"}
        assert server.post(TEXT, {"prompt": "a" * 2000}, **auth).status_code == 413
        chunked = (b"[" for _ in range(2000))
        with server.client() as client:
            response = client.post(TEXT, content=chunked, headers={"content-type": "application/json", **auth})
        assert response.status_code == 413
        assert server.get("/health", host="evil.example").status_code == 403
        assert server.get("/health", host="127.0.0.1:1").status_code == 200
        with server.client() as client:
            asked = client.options(
                TEXT, headers={"origin": "https://a.example", "access-control-request-method": "POST"}
            )
        assert asked.headers["access-control-allow-origin"] == "https://a.example"
        long = server.get("/health", **{"x-long": "a" * 40000})
        assert long.status_code == 431


def test_other_origins_are_not_let_in_by_default(tiny: Running) -> None:
    response = tiny.get("/v1/models", origin="https://evil.example")
    assert "access-control-allow-origin" not in response.headers


def test_a_full_queue_says_when_to_come_again(folder_of: Callable[[str], Path]) -> None:
    with running({"tiny": folder_of("llama")}, dtype="float32", num_threads=1, max_num_seqs=1, max_queue=1) as server:
        threads = [
            threading.Thread(target=server.post, args=(TEXT, {"prompt": "ab", "max_tokens": 4})) for _ in range(2)
        ]
        with hold(server.engine.llm) as held:
            threads[0].start()
            assert held.started.wait(60)
            threads[1].start()
            wait_until(lambda: server.state.pool.default.num_open == 2)
            refused = server.post(TEXT, {"prompt": "ab"})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
        for thread in threads:
            thread.join()
        assert server.post(TEXT, {"prompt": "ab", "max_tokens": 1}).status_code == 200


# --- ends -----------------------------------------------------------------------------------------------------------


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_is_not_answered_any_longer(folder_of: Callable[[str], Path], stream: bool) -> None:
    body = json.dumps({"prompt": "ab" * 10, "max_tokens": 90, "ignore_eos": True, "stream": stream})
    head = f"POST {TEXT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with running({"tiny": folder_of("granite-hybrid")}, dtype="float32", num_threads=1, max_num_seqs=4) as server:
        steps, url = server.engine.stats().steps, httpx.URL(server.url)
        with hold(server.engine.llm) as held:
            with socket.create_connection((url.host, url.port)) as connection:
                connection.sendall(f"{head}{body}".encode())
                assert held.started.wait(60)
            wait_until(lambda: server.state.pool.default.num_open == 0)
        wait_until(lambda: server.metric("tinyserve_cache_blocks_used") == 0)
        assert server.engine.stats().steps <= steps + 2
        assert not server.engine._jobs


def test_a_dead_engine_is_told_everywhere(folder_of: Callable[[str], Path]) -> None:
    """Those that wait get a status; a stream that has begun ends with an event that says so."""
    with running({"tiny": folder_of("llama")}, dtype="float32", num_threads=1, max_num_seqs=2) as server:
        begun: list[httpx.Response] = []
        refused: list[httpx.Response] = []
        body = {"prompt": "ab", "max_tokens": 50, "ignore_eos": True}

        def ask_for(stream: bool, answers: list[httpx.Response]) -> None:
            answers.append(server.post(TEXT, {**body, "stream": stream}))

        def broken(_: Any) -> Any:
            raise SystemError("a mistake of the engine's own")

        kinds = [(True, begun), (False, refused), (True, refused), (False, refused)]
        threads = [threading.Thread(target=ask_for, args=kind) for kind in kinds]
        with hold(server.engine.llm, after=2) as held:
            threads[0].start()
            assert held.started.wait(60)
            for thread in threads[1:]:
                thread.start()
            wait_until(lambda: server.state.pool.default.num_open == 4)
            server.engine.llm.engine.step = broken  # type: ignore[method-assign]
            server.engine.llm.engine.has_work = broken  # type: ignore[method-assign]
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert [answer.status_code for answer in begun] == [200]
        events = [line for line in begun[0].text.splitlines() if line.startswith("data:")]
        assert len(events) >= 2 and '"code":"engine_dead"' in events[-1]
        assert [answer.status_code for answer in refused] == [503] * 3
        assert all(answer.json()["error"]["code"] == "engine_dead" for answer in refused)
        for path in ("/health", "/ready", "/v1/models", "/metrics", "/"):
            response = server.get(path)
            assert response.status_code == 503 and response.json()["error"]["code"] == "engine_dead"


# --- several models -------------------------------------------------------------------------------------------------


def test_models_come_and_go_within_the_memory(folder_of: Callable[[str], Path]) -> None:
    options: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 2, "kv_cache_memory": 1 << 20}
    names = {"a": folder_of("llama"), "b": folder_of("granite-hybrid"), "c": folder_of("gpt2")}
    expected = {
        name: LLM(folder, **options).generate("ab", SamplingParams(temperature=0, max_tokens=8))
        for name, folder in names.items()
    }
    with running(names, **options) as probe:
        for name in names:
            probe.post(TEXT, {"model": name, "prompt": "ab", "max_tokens": 1})
        sizes = sorted(model.nbytes for model in probe.state.pool.models.values())
    with running(names, memory=sizes[-1] + sizes[-2], **options) as server:
        assert [card["loaded"] for card in server.get("/v1/models").json()["data"]] == [True, False, False]
        for name in "abcabcca":
            answer = server.post(TEXT, {"model": name, "prompt": "ab", "max_tokens": 8, "temperature": 0}).json()
            assert answer["choices"][0]["text"] == expected[name][0].outputs[0].text
            assert sum(model.nbytes for model in server.state.pool.models.values()) <= server.state.pool.memory
    with running(names, memory=sizes[0] // 2, **options) as server:
        refused = server.post(TEXT, {"model": "a", "prompt": "ab"})
        assert refused.status_code == 503 and "--memory" in refused.json()["error"]["message"]
        assert server.get("/ready").status_code == 503 and server.get("/health").status_code == 200
