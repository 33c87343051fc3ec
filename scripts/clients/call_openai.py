"""The calls of OpenAI's own client: chat, completions, embeddings, models, and what a server of texts refuses."""

from collections.abc import Mapping
from typing import Any

import openai

from clients.shared import (
    ASK,
    CALL,
    CONVERSATION,
    QUESTION,
    SYSTEM,
    TOOL,
    Calls,
    City,
    Trip,
    awaited,
    drained,
    plain,
    refused,
)

PARTS: list[Any] = [
    {"role": "developer", "content": [{"type": "text", "text": SYSTEM}]},
    {"role": "user", "name": "me", "content": [{"type": "text", "text": ASK}, {"type": "text", "text": "Please."}]},
    {"role": "assistant", "content": [{"type": "text", "text": "I look."}], "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "sunny"}]},
    {"role": "assistant", "name": "guide", "content": "It is sunny."},
    {"role": "user", "content": "Where?"},
]


def calls(url: str, model: str) -> Calls:
    """Every call by name; none is made yet."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)

    def chat(**options: Any) -> Any:
        return client.chat.completions.create(**{"model": model, "messages": QUESTION} | options)

    def text(**options: Any) -> Any:
        return client.completions.create(**{"model": model, "prompt": "Paris is", "max_tokens": 8} | options)

    def embed(**options: Any) -> Any:
        return client.embeddings.create(model=model, **options)

    def stream_to_the_end(**options: Any) -> None:
        with client.chat.completions.stream(model=model, messages=QUESTION, **options) as stream:
            for _ in stream:
                pass
            stream.get_final_completion()

    async def chat_async(stream: bool) -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as other:
            answer = await other.chat.completions.create(model=model, messages=QUESTION, max_tokens=8, stream=stream)
            if stream:
                async for _ in answer:
                    pass

    named = {"type": "function", "function": {"name": "get_weather"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}
    custom = {"type": "custom", "custom": {"name": "run", "description": "Runs a line of code."}}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    strict = openai.pydantic_function_tool(City)
    everything: Mapping[str, Any] = {
        "frequency_penalty": 0.1, "logit_bias": {"5": -1}, "logprobs": True, "top_logprobs": 2, "n": 2, "seed": 7,
        "max_completion_tokens": 8, "metadata": {"run": "1"}, "modalities": ["text"], "parallel_tool_calls": True,
        "prediction": {"type": "content", "content": "Paris"}, "presence_penalty": 0.1, "prompt_cache_key": "key",
        "prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "implicit"}, "reasoning_effort": "low",
        "response_format": {"type": "text"}, "safety_identifier": "me", "service_tier": "auto", "stop": ["\n\n", "END"],
        "store": False, "temperature": 0.7, "top_p": 0.9, "user": "me", "verbosity": "low", "tools": [TOOL],
    }  # fmt: skip
    usage: dict[str, Any] = {"include_usage": True, "include_obfuscation": False}
    vllm: dict[str, Any] = {
        "top_k": 5,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    vllm["chat_template_kwargs"] = {"enable_thinking": False}
    return {
        "models": drained(client.models.list),
        "model": plain(lambda: client.models.retrieve(model)),
        "chat": plain(chat),
        "chat with a limit": plain(lambda: chat(max_tokens=8)),
        "chat with everything": plain(lambda: chat(**everything)),
        "streamed chat with everything": drained(
            lambda: chat(**everything, stream=True, stream_options=usage)
        ),
        "streamed chat": drained(lambda: chat(stream=True)),
        "chat and its headers": plain(lambda: client.chat.completions.with_raw_response.create(
            model=model, messages=QUESTION, max_tokens=8)),
        "asynchronous chat": awaited(lambda: chat_async(False)),
        "asynchronous stream": awaited(lambda: chat_async(True)),
        "stream helper": plain(stream_to_the_end),
        "stream helper with a class": plain(lambda: stream_to_the_end(response_format=City)),
        "reasoning": plain(lambda: chat(reasoning_effort="none", max_completion_tokens=8)),
        "a class": plain(lambda: client.chat.completions.parse(model=model, messages=QUESTION, response_format=City)),
        "a nested class": plain(
            lambda: client.chat.completions.parse(model=model, messages=QUESTION, response_format=Trip)
        ),
        "any JSON": plain(lambda: chat(response_format={"type": "json_object"}, max_tokens=16)),
        "tools": plain(lambda: chat(tools=[TOOL])),
        "streamed tools": drained(lambda: chat(tools=[TOOL], stream=True)),
        "a tool must be called": plain(lambda: chat(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)),
        "a named tool": plain(lambda: chat(tools=[TOOL, strict], tool_choice=named)),
        "a streamed named tool": drained(lambda: chat(tools=[TOOL], tool_choice=named, stream=True)),
        "a tool of a class": plain(
            lambda: client.chat.completions.parse(
                model=model, messages=QUESTION, tools=[strict], tool_choice="required", parallel_tool_calls=False
            )
        ),
        "no tool may be called": plain(lambda: chat(tools=[TOOL], tool_choice="none")),
        "a tool without parameters": plain(
            lambda: chat(tools=[{"type": "function", "function": {"name": "now"}}], max_tokens=8)
        ),
        "allowed tools": refused(lambda: chat(tools=[TOOL, strict], tool_choice=allowed)),
        "custom tools": refused(lambda: chat(tools=[custom], tool_choice="none")),
        "a tool's result": plain(lambda: chat(messages=CONVERSATION, tools=[TOOL])),
        "a tool's result, in parts": plain(lambda: chat(messages=PARTS, tools=[TOOL])),
        "an answer sent back as it came": plain(lambda: chat(messages=[
            *QUESTION, chat(max_tokens=8).choices[0].message, {"role": "user", "content": "Really?"}])),
        "vLLM's fields": plain(lambda: chat(extra_body=vllm, max_tokens=8)),
        "vLLM's structures": plain(lambda: chat(extra_body={"structured_outputs": {"choice": ["yes", "no"]}})),
        "vLLM's older structures": plain(lambda: chat(extra_body={"guided_choice": ["yes", "no"]})),
        "functions": refused(
            lambda: chat(functions=[TOOL["function"]], function_call={"name": "get_weather"}, max_tokens=8)
        ),
        "sound": refused(lambda: chat(modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"})),
        "a picture": refused(lambda: chat(messages=[{"role": "user", "content": [picture]}])),
        "a web search": refused(lambda: chat(web_search_options={})),
        "moderation": refused(lambda: chat(extra_body={"moderation": {"model": "any"}}, max_tokens=8)),
        "stored": plain(lambda: chat(store=True, max_tokens=8)),
        "completion": plain(text),
        "completion with everything": plain(lambda: text(
            best_of=3, echo=True, frequency_penalty=0.1, logit_bias={"5": -1}, logprobs=2, n=2, presence_penalty=0.1,
            seed=7, stop=["\n"], temperature=0.7, top_p=0.9, user="me")),
        "streamed completion": drained(lambda: text(stream=True, stream_options={"include_usage": True})),
        "completions": plain(lambda: text(prompt=["Paris is", "Rome is"])),
        "a completion of tokens": plain(lambda: text(prompt=[5, 6, 7])),
        "completions of tokens": plain(lambda: text(prompt=[[5, 6, 7], [8, 9]], logprobs=0)),
        "a completion with an end": refused(lambda: text(suffix=" in summer.")),
        "embedding": plain(lambda: embed(input="Paris")),
        "embeddings": plain(lambda: embed(input=["Paris", "Rome"], encoding_format="float", user="me")),
        "an embedding of tokens": plain(lambda: embed(input=[5, 6, 7])),
        "a shorter embedding": refused(lambda: embed(input="Paris", dimensions=2)),
        "the Responses API": refused(lambda: client.responses.create(model=model, input=ASK)),
        "moderations": refused(lambda: client.moderations.create(input=ASK)),
    }  # fmt: skip
