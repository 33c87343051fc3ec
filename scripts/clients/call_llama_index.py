"""The calls of LlamaIndex' OpenAILike, for servers that speak as OpenAI's: chat, completions, tools, structures."""

from typing import Any

from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai_like import OpenAILike

from clients.shared import ASK, CALL, SYSTEM, Calls, City, awaited, drained, get_weather, plain

MESSAGES = [ChatMessage(role=MessageRole.SYSTEM, content=SYSTEM), ChatMessage(role=MessageRole.USER, content=ASK)]
HISTORY = [
    *MESSAGES,
    ChatMessage(role=MessageRole.ASSISTANT, content=None, additional_kwargs={"tool_calls": [CALL]}),
    ChatMessage(role=MessageRole.TOOL, content="sunny", additional_kwargs={"tool_call_id": "call_1"}),
]


def calls(url: str, model: str) -> Calls:
    """Every call by name; none is made yet."""

    def llm(**options: Any) -> OpenAILike:
        defaults = {"is_chat_model": True, "is_function_calling_model": True, "max_tokens": 300}
        return OpenAILike(model=model, api_base=url, api_key="none", max_retries=0, **defaults | options)

    async def stream_async() -> None:
        async for _ in await llm().astream_chat(MESSAGES):
            pass

    weather = FunctionTool.from_defaults(get_weather)
    everything: dict[str, Any] = {
        "temperature": 0.7, "max_tokens": 8, "logprobs": True, "top_logprobs": 2, "reasoning_effort": "low",
        "additional_kwargs": {"seed": 7, "stop": ["END"], "user": "me", "top_p": 0.9, "presence_penalty": 0.1},
    }  # fmt: skip
    embedding = OpenAIEmbedding(model_name=model, api_base=url, api_key="none", max_retries=0)
    structured = llm(should_use_structured_outputs=True)
    return {
        "chat": plain(lambda: llm().chat(MESSAGES)),
        "chat with everything": plain(lambda: llm(**everything).chat(MESSAGES)),
        "stream": drained(lambda: llm().stream_chat(MESSAGES)),
        "asynchronous stream": awaited(stream_async),
        "complete by chat": plain(lambda: llm().complete("Paris is")),
        "completion": plain(lambda: llm(is_chat_model=False, max_tokens=8).complete("Paris is")),
        "streamed completion": drained(lambda: llm(is_chat_model=False, max_tokens=8).stream_complete("Paris is")),
        "tools": plain(lambda: llm().chat_with_tools([weather], ASK)),
        "a tool must be called": plain(lambda: llm().chat_with_tools([weather], ASK, tool_required=True)),
        "streamed tools": drained(lambda: llm().stream_chat_with_tools([weather], ASK)),
        "a tool's result": plain(lambda: llm().chat_with_tools([weather], chat_history=HISTORY)),
        "structured output": plain(lambda: llm().structured_predict(City, PromptTemplate(ASK))),
        "structured output by a schema": plain(lambda: structured.structured_predict(City, PromptTemplate(ASK))),
        "a structured model": plain(lambda: llm().as_structured_llm(City).chat(MESSAGES)),
        "embedding": plain(lambda: embedding.get_query_embedding("Paris")),
        "embeddings": plain(lambda: embedding.get_text_embedding_batch(["Paris", "Rome"])),
    }
