"""The calls of LiteLLM, as OpenAI's server and as vLLM's."""

from typing import Any

import litellm

from clients.shared import CONVERSATION, QUESTION, TOOL, Calls, City, awaited, drained, plain


def calls(url: str, model: str) -> Calls:
    """Every call by name; none is made yet."""
    litellm.suppress_debug_info = True
    common: dict[str, Any] = {"api_base": url, "api_key": "none", "num_retries": 0}

    def chat(provider: str = "openai", **options: Any) -> Any:
        return litellm.completion(**common, **{"model": f"{provider}/{model}", "messages": QUESTION} | options)

    async def stream_async() -> None:
        answer = await litellm.acompletion(**common, model=f"openai/{model}", messages=QUESTION, stream=True)
        async for _ in answer:
            pass

    everything: dict[str, Any] = {
        "temperature": 0.7, "max_tokens": 8, "n": 2, "seed": 7, "stop": ["END"], "logprobs": True, "top_logprobs": 2,
        "top_p": 0.9, "user": "me", "presence_penalty": 0.1, "logit_bias": {"5": -1}, "parallel_tool_calls": True,
        "tools": [TOOL],
    }  # fmt: skip
    named = {"type": "function", "function": {"name": "get_weather"}}
    return {
        "chat": plain(chat),
        "chat with everything": plain(lambda: chat(**everything)),
        "reasoning": plain(
            lambda: chat(reasoning_effort="low", max_completion_tokens=8, allowed_openai_params=["reasoning_effort"])
        ),
        "stream": drained(lambda: chat(stream=True)),
        "stream with usage": drained(lambda: chat(stream=True, stream_options={"include_usage": True})),
        "asynchronous stream": awaited(stream_async),
        "tools": plain(lambda: chat(tools=[TOOL], tool_choice="auto")),
        "a named tool": plain(lambda: chat(tools=[TOOL], tool_choice=named)),
        "a tool's result": plain(lambda: chat(messages=CONVERSATION, tools=[TOOL])),
        "a class": plain(lambda: chat(response_format=City)),
        "as vLLM": plain(lambda: chat("hosted_vllm", max_tokens=8, top_k=5, repetition_penalty=1.1)),
        "as vLLM, a class": plain(lambda: chat("hosted_vllm", response_format=City)),
        "as vLLM, reasoning": plain(lambda: chat("hosted_vllm", max_tokens=8, reasoning_effort="low")),
        "completion": plain(
            lambda: litellm.text_completion(
                **common, model=f"text-completion-openai/{model}", prompt="Paris is", max_tokens=8
            )
        ),
        "embeddings": plain(lambda: litellm.embedding(**common, model=f"openai/{model}", input=["Paris", "Rome"])),
    }
