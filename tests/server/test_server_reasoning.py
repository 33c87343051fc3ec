"""What a model thinks reaches clients apart from its answer: whole, in a stream, counted, and left out if they ask."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from checkpoints import CHAT_TEMPLATE, CONFIGS, write_folder
from servers import Running, running

CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "Why?"}]
TEMPLATE = (
    CHAT_TEMPLATE + "{% if reasoning_effort %}effort {{ reasoning_effort }}\n{% endif %}"
    "{% if enable_thinking is not false %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
)
BODY: dict[str, Any] = {
    "messages": QUESTION,
    "temperature": 0,
    "max_tokens": 60,
    "thinking_token_budget": 6,
    "structured_outputs": {"choice": ["Because."]},
}
NAMED = {"type": "function", "function": {"name": "look"}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    raw = CONFIGS["llama"] | {"max_position_embeddings": 1024}
    folder: Path = write_folder(tmp_path_factory.mktemp("thinker"), raw)
    options: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 4, "chat_template": TEMPLATE}
    with running({"tiny": folder}, **options) as server:
        yield server


def events(response: Any) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


def test_thinking_is_apart_from_the_answer(thinker: Running) -> None:
    answer = thinker.post(CHAT, BODY).json()
    message, usage = answer["choices"][0]["message"], answer["usage"]
    assert message["content"] == "Because." and answer["choices"][0]["finish_reason"] == "stop"
    assert message["reasoning"] and message["reasoning"] == message["reasoning_content"]
    thought = usage["completion_tokens_details"]["reasoning_tokens"]
    assert 6 < thought < usage["completion_tokens"]

    stream = events(thinker.post(CHAT, {**BODY, "stream": True, "stream_options": {"include_usage": True}}))
    deltas = [choice["delta"] for event in stream for choice in event["choices"]]
    for name, text in (("content", "Because."), ("reasoning", message["reasoning"]),
                       ("reasoning_content", message["reasoning"])):  # fmt: skip
        assert "".join(delta.get(name) or "" for delta in deltas) == text
    assert sum("reasoning" in delta for delta in deltas) > 1, "it comes as it is thought"
    assert stream[-1]["usage"] == usage | {"prompt_tokens_details": stream[-1]["usage"]["prompt_tokens_details"]}


def test_thinking_is_left_out_for_who_does_not_want_it(thinker: Running) -> None:
    whole = thinker.post(CHAT, {**BODY, "include_reasoning": False}).json()
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "Because.", "refusal": None}
    assert whole["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0, "it was thought all the same"
    stream = events(thinker.post(CHAT, {**BODY, "stream": True, "include_reasoning": False}))
    assert not any("reasoning" in choice["delta"] for event in stream for choice in event["choices"])


def test_how_much_is_thought_is_the_templates_to_know(thinker: Running) -> None:
    def prompt_tokens(**fields: Any) -> int:
        return int(thinker.post(CHAT, {**BODY, **fields}).json()["usage"]["prompt_tokens"])

    plain = prompt_tokens()
    effort = len(thinker.post("/tokenize", {"prompt": "effort low\n", "add_special_tokens": False}).json()["tokens"])
    assert prompt_tokens(reasoning_effort="low") == plain + effort
    assert prompt_tokens(chat_template_kwargs={"reasoning_effort": "low"}) == plain + effort
    none = thinker.post(CHAT, {**BODY, "reasoning_effort": "none"}).json()["choices"][0]["message"]
    assert "reasoning" not in none and none["content"] == "Because."
    off = thinker.post(CHAT, {**BODY, "chat_template_kwargs": {"enable_thinking": False}}).json()
    assert "reasoning" not in off["choices"][0]["message"]
    asked = {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}
    assert "reasoning" in thinker.post(CHAT, {**BODY, **asked}).json()["choices"][0]["message"]


@pytest.mark.parametrize("format", ["json", "qwen3-coder"])
def test_a_forced_call_is_behind_the_thinking(thinker: Running, format: str) -> None:
    body = {key: value for key, value in BODY.items() if key != "structured_outputs"}
    thinker.state.tool_format = format
    try:
        whole = thinker.post(CHAT, {**body, "tools": TOOLS, "tool_choice": NAMED}).json()["choices"][0]["message"]
    finally:
        thinker.state.tool_format = None
    assert whole["reasoning"] and [call["function"]["name"] for call in whole["tool_calls"]] == ["look"]
    assert json.loads(whole["tool_calls"][0]["function"]["arguments"]) == {}


def test_an_answer_may_be_sent_back_with_its_thinking(thinker: Running) -> None:
    message = thinker.post(CHAT, BODY).json()["choices"][0]["message"]
    again = thinker.post(CHAT, {**BODY, "messages": [*QUESTION, message, *QUESTION]})
    assert again.status_code == 200, again.text


def test_openais_client_reads_it(thinker: Running) -> None:
    client = openai.OpenAI(base_url=f"{thinker.url}/v1", api_key="none", max_retries=0)
    extra = {key: BODY[key] for key in ("thinking_token_budget", "structured_outputs")}
    create: Callable[..., Any] = client.chat.completions.create
    said = create(model="tiny", messages=QUESTION, temperature=0, max_tokens=60, reasoning_effort="high",
                  extra_body=extra)  # fmt: skip
    assert said.choices[0].message.content == "Because." and said.choices[0].message.reasoning_content
    assert said.usage.completion_tokens_details.reasoning_tokens > 6
    with create(model="tiny", messages=QUESTION, temperature=0, max_tokens=60, stream=True, extra_body=extra) as chunks:
        thoughts = [getattr(chunk.choices[0].delta, "reasoning", None) for chunk in chunks]
    assert "".join(filter(None, thoughts))


@pytest.mark.parametrize(("field", "value"), [("thinking_token_budget", -1), ("reasoning_effort", 3)])
def test_a_wrong_value_is_named(thinker: Running, field: str, value: Any) -> None:
    response = thinker.post(CHAT, {**BODY, field: value})
    assert response.status_code == 400 and response.json()["error"]["param"] == field
