"""The calls of langchain-openai: chat models with tools and structures, completions, embeddings."""

from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

from clients.shared import ASK, CITY_JSON, SYSTEM, Calls, City, awaited, drained, get_weather, plain

MESSAGES: list[Any] = [SystemMessage(SYSTEM), HumanMessage(ASK)]
HISTORY: list[Any] = [
    *MESSAGES,
    AIMessage("", tool_calls=[{"name": "get_weather", "args": {"city": "Paris", "unit": "celsius"}, "id": "call_1"}]),
    ToolMessage("sunny", tool_call_id="call_1"),
]


def calls(url: str, model: str) -> Calls:
    """Every call by name; none is made yet."""
    common: dict[str, Any] = {"base_url": url, "api_key": "none", "model": model, "max_retries": 0}

    def chat(**options: Any) -> ChatOpenAI:
        return ChatOpenAI(**common, **options)

    weather = tool(get_weather)
    llm = chat()
    everything = chat(
        temperature=0.7, max_tokens=8, seed=7, stop=["END"], logprobs=True, top_logprobs=2, n=2, top_p=0.9,
        presence_penalty=0.1, frequency_penalty=0.1, logit_bias={5: -1}, reasoning_effort="low", verbosity="low",
        service_tier="auto", store=False, model_kwargs={"user": "me", "metadata": {"run": "1"}},
        extra_body={"top_k": 5},
    )  # fmt: skip

    async def stream_async() -> None:
        async for _ in llm.astream(MESSAGES):
            pass

    def embed(**options: Any) -> OpenAIEmbeddings:
        return OpenAIEmbeddings(**common, check_embedding_ctx_length=False, **options)

    return {
        "invoke": plain(lambda: llm.invoke(MESSAGES)),
        "invoke with everything": plain(lambda: everything.invoke(MESSAGES)),
        "stream": drained(lambda: llm.stream(MESSAGES)),
        "stream with usage": drained(lambda: chat(stream_usage=True).stream(MESSAGES)),
        "streaming invoke": plain(lambda: chat(streaming=True).invoke(MESSAGES)),
        "asynchronous stream": awaited(stream_async),
        "batch": plain(lambda: llm.batch([[HumanMessage("Paris?")], [HumanMessage("Rome?")]])),
        "parts": plain(lambda: llm.invoke([HumanMessage([{"type": "text", "text": ASK}])])),
        "tools": plain(lambda: llm.bind_tools([weather]).invoke(MESSAGES)),
        "strict tools": plain(
            lambda: llm.bind_tools([weather], strict=True, parallel_tool_calls=False).invoke(MESSAGES)
        ),
        "any tool": plain(lambda: llm.bind_tools([weather, City], tool_choice="any").invoke(MESSAGES)),
        "a named tool": plain(lambda: llm.bind_tools([weather], tool_choice="get_weather").invoke(MESSAGES)),
        "streamed tools": drained(lambda: llm.bind_tools([weather]).stream(MESSAGES)),
        "a tool's result": plain(lambda: llm.bind_tools([weather]).invoke(HISTORY)),
        "structured output": plain(lambda: llm.with_structured_output(City).invoke(MESSAGES)),
        "streamed structured output": drained(lambda: llm.with_structured_output(City).stream(MESSAGES)),
        "structured output of a call": plain(
            lambda: llm.with_structured_output(City, method="function_calling").invoke(MESSAGES)
        ),
        "structured output in JSON": (
            CITY_JSON,
            lambda: llm.with_structured_output(City, method="json_mode").invoke(MESSAGES),
        ),
        "completion": plain(lambda: OpenAI(**common, max_tokens=8).invoke("Paris is")),
        "streamed completion": drained(lambda: OpenAI(**common, max_tokens=8).stream("Paris is")),
        "completions": plain(lambda: OpenAI(**common, max_tokens=8, n=2, best_of=2).generate(["Paris is", "Rome is"])),
        "embedding": plain(lambda: embed().embed_query("Paris")),
        "embeddings": plain(lambda: embed().embed_documents(["Paris", "Rome"])),
    }
