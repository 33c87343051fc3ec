"""POST /v1/chat/completions: a conversation's next message, whole or as a stream."""

import asyncio
from contextlib import AbstractAsyncContextManager, aclosing
from random import Random
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tinyserve.async_engine import AsyncEngine
from tinyserve.llm import LLM
from tinyserve.progress import Progress
from tinyserve.server.answers import UsageCounter, chat_logprobs, usage
from tinyserve.server.protocol import ChatBody, ExplainBody, TemplateBody, TokenizeBody
from tinyserve.server.sampling import chat_params
from tinyserve.server.sse import EventStream, SSEWriter
from tinyserve.server.state import Json, State, cancel_on_disconnect, name_of_answer, read, state_of
from tinyserve.text.chat import ChatRequest
from tinyserve.text.request import CompletionOutput, StreamChunk
from tinyserve.text.tool_parser import ToolCall, ToolCallDelta


async def chat_completions(request: Request) -> Response:
    body = await read(request, ChatBody)
    chat = _Chat(state_of(request), body, *name_of_answer(request, "chatcmpl"))
    if body.stream:
        return EventStream(chat.stream)
    return Json(await cancel_on_disconnect(request, chat.whole()))


def template_options(body: ChatBody | ExplainBody | TemplateBody | TokenizeBody) -> dict[str, Any]:
    """What a request tells the chat template, beside its messages, as `LLM.chat_request` takes it."""
    return {
        "tools": body.tools or None,  # some clients send an empty list for none
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message is True,
        "chat_template_kwargs": body.chat_template_kwargs,
    }


class _Chat:
    """One request, whose answers are the choices of its response."""

    def __init__(self, state: State, body: ChatBody, name: str, created: int):
        self._state, self._body = state, body
        self._model = state.pool.find(body.model)
        self._id, self._created = name, created
        self._random = Random(name)  # so that whoever answers anew under this name gives its calls the same ids
        self._answers = body.best_of or body.n or 1

    async def whole(self) -> dict[str, Any]:
        """The whole response."""
        async with self._engine() as engine:
            prompt, params = await asyncio.to_thread(self._request, engine.llm)
            with self._state.metrics.watch(self._model.name, self._body.n or 1) as watch:
                output = await engine.complete(prompt, params, self._id, self._body.priority)
                for answer in output.outputs:
                    watch.ended(answer.metrics, answer.finish_reason)
            choices = [self._choice(engine.llm, answer) for answer in output.outputs]
            tokens = sum(len(answer.token_ids) for answer in output.outputs)
            thought = sum(answer.reasoning_tokens for answer in output.outputs)
            return {
                **self._head("chat.completion"),
                "choices": choices,
                "usage": usage(output.metrics, tokens, thought),
            }

    async def stream(self, events: SSEWriter) -> None:
        """The response as events; the first of each choice has its role."""
        counter = UsageCounter()
        async with self._engine(events.progress) as engine:
            prompt, params = await asyncio.to_thread(self._request, engine.llm)
            with self._state.metrics.watch(self._model.name, self._body.n or 1) as watch:
                stream = engine.generate(prompt, params, self._id, self._body.priority, events.prefill)
                async with aclosing(stream) as chunks:
                    async for chunk in chunks:
                        if counter.is_first(chunk):
                            self._send(events, {"index": chunk.index, "delta": {"role": "assistant", "content": ""}})
                        self._send_chunk(events, engine.llm, chunk)
                        if chunk.finish_reason is not None:
                            watch.ended(chunk.metrics, chunk.finish_reason)
        options = self._body.stream_options
        if options is not None and options.include_usage:
            events.event({**self._head("chat.completion.chunk"), "choices": [], "usage": counter.usage()})
        events.done()

    def _engine(self, progress: Progress | None = None) -> AbstractAsyncContextManager[AsyncEngine]:
        return self._state.engine(self._model, self._body, self._answers, progress)

    def _request(self, llm: LLM) -> ChatRequest:
        body, variables = self._body, template_options(self._body)
        if body.reasoning_effort is not None:
            variables["reasoning_effort"] = body.reasoning_effort
        return llm.chat_request(
            body.messages,
            chat_params(body, llm),
            tool_choice=body.tool_choice,
            tool_format=self._state.tool_format if body.tools else None,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            add_special_tokens=body.add_special_tokens is True,
            **variables,
        )

    def _send_chunk(self, events: SSEWriter, llm: LLM, chunk: StreamChunk) -> None:
        """An event with what has come, and one of its own for the end: clients read no text in that one."""
        delta = self._reasoning(chunk.reasoning) | ({"content": chunk.text} if chunk.text else {})
        if chunk.tool_call_deltas:
            delta["tool_calls"] = [self._part(llm, part) for part in chunk.tool_call_deltas]
        choice = {"index": chunk.index, "delta": delta}
        if self._body.logprobs:
            choice["logprobs"] = self._logprobs(llm, chunk)
        if delta or (chunk.token_ids and self._body.logprobs):
            self._send(events, choice)
        if chunk.finish_reason is not None:
            reason = {"finish_reason": chunk.finish_reason, "stop_reason": chunk.stop_reason}
            self._send(events, {"index": chunk.index, "delta": {}, **reason})

    def _send(self, events: SSEWriter, choice: dict[str, Any]) -> None:
        choice = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": None} | choice
        events.event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def _choice(self, llm: LLM, answer: CompletionOutput) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.tool_calls:
            calls = [self._call(llm, call) for call in answer.tool_calls]
            message |= {"content": answer.text or None, "tool_calls": calls}
        message |= self._reasoning(answer.reasoning)
        return {
            "index": answer.index,
            "message": message,
            "logprobs": self._logprobs(llm, answer) if self._body.logprobs else None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }

    def _reasoning(self, text: str) -> dict[str, Any]:
        """What was thought, under vLLM's name and the one that clients know from DeepSeek."""
        return {"reasoning": text, "reasoning_content": text} if text and self._body.include_reasoning else {}

    def _logprobs(self, llm: LLM, answer: CompletionOutput | StreamChunk) -> dict[str, Any]:
        assert llm.tokenizer is not None  # it has encoded the conversation
        return chat_logprobs(llm.tokenizer, answer.token_ids, answer.logprobs or [], self._body.top_logprobs or 0)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model.name}

    def _part(self, llm: LLM, part: ToolCallDelta) -> dict[str, Any]:
        """What a call has more, in a stream: its first part has all but the arguments."""
        if part.name is None:
            return {"index": part.index, "function": {"arguments": part.arguments}}
        return {"index": part.index, **self._call(llm, ToolCall(part.name, part.arguments))}

    def _call(self, llm: LLM, call: ToolCall) -> dict[str, Any]:
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": llm.new_call_id(self._random), "type": "function", "function": function}
