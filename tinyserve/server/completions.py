"""POST /v1/completions: each prompt is continued, whole or as a stream; with `echo`, the text begins with it."""

import asyncio
from collections.abc import Coroutine, Iterable
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from tinyserve.async_engine import AsyncEngine
from tinyserve.llm import LLM
from tinyserve.progress import Progress
from tinyserve.sampling_params import SamplingParams
from tinyserve.scheduling.sequence import Logprobs
from tinyserve.server.answers import TextOffsets, UsageCounter, completion_logprobs, total, usage
from tinyserve.server.errors import ApiError
from tinyserve.server.protocol import CompletionBody
from tinyserve.server.sampling import completion_params
from tinyserve.server.sse import EventStream, SSEWriter
from tinyserve.server.state import Json, State, cancel_on_disconnect, name_of_answer, read, state_of
from tinyserve.text.request import RequestOutput
from tinyserve.text.validation import Prompt

MOST_PROMPTS = 1024

TextOrIds = str | list[int]
T = TypeVar("T")


async def completions(request: Request) -> Response:
    body = await read(request, CompletionBody)
    work = _Completion(state_of(request), body, *name_of_answer(request, "cmpl"))
    if body.stream:
        return EventStream(work.stream)
    return Json(await cancel_on_disconnect(request, work.whole()))


def prompts_of(given: Any, field: str) -> list[TextOrIds]:
    """A text, the ids of one, or a list of several; raises ApiError that names the field for anything else."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if _are_ids(given):
            return [given]
        if len(given) <= MOST_PROMPTS and all(isinstance(item, str) or _are_ids(item) for item in given):
            return given
    what = f"a list of {len(given)}" if isinstance(given, list) else f"{given!r:.60}"
    raise ApiError(
        400,
        f"{field} is {what}; it must be a text, a list of token ids, or a list of 1 to {MOST_PROMPTS} of these.",
        param=field,
    )


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in given)


class _Completion:
    """One request; choice i of prompt p has index p * n + i."""

    def __init__(self, state: State, body: CompletionBody, name: str, created: int):
        self._state, self._body = state, body
        self._model = state.pool.find(body.model)
        self._prompts = prompts_of(body.prompt, "prompt")
        self._id, self._created = name, created
        self._n = body.n or 1
        self._answers = (body.best_of or self._n) * len(self._prompts)
        self._scores_only = bool(body.echo) and body.max_tokens == 0
        if body.stream and body.echo and body.logprobs is not None:
            raise ApiError(400, "echo with logprobs comes whole: leave out stream, or one of the two.", param="echo")

    async def whole(self) -> dict[str, Any]:
        """The whole response."""
        async with self._engine() as engine:
            params = completion_params(self._body, engine.llm)
            outputs = await _together(self._complete(engine, prompt, params) for prompt in self._prompts)
            choices, usages = [], []
            for p, (prompt, output) in enumerate(zip(self._prompts, outputs, strict=True)):
                choices += self._choices(engine.llm, p, prompt, output)
                tokens = 0 if self._scores_only else sum(len(answer.token_ids) for answer in output.outputs)
                usages.append(usage(output.metrics, tokens))
            return {**self._head(), "choices": choices, "usage": total(usages)}

    async def _complete(self, engine: AsyncEngine, prompt: TextOrIds, params: SamplingParams) -> RequestOutput:
        with self._state.metrics.watch(self._model.name, self._n) as watch:
            output = await engine.complete(self._tokenized(prompt), params, priority=self._body.priority)
            for answer in output.outputs:
                watch.ended(answer.metrics, answer.finish_reason)
            return output

    async def stream(self, events: SSEWriter) -> None:
        """The response as events; those of several prompts are interleaved."""
        async with self._engine(events.progress) as engine:
            params = completion_params(self._body, engine.llm)
            counts = await _together(
                self._stream(events, engine, p, prompt, params) for p, prompt in enumerate(self._prompts)
            )
        options = self._body.stream_options
        if options is not None and options.include_usage:
            events.event({**self._head(), "choices": [], "usage": total([count.usage() for count in counts])})
        events.done()

    async def _stream(
        self, events: SSEWriter, engine: AsyncEngine, p: int, prompt: TextOrIds, params: SamplingParams
    ) -> UsageCounter:
        counter, offsets = UsageCounter(), [self._offsets(engine.llm, prompt) for _ in range(self._n)]
        with self._state.metrics.watch(self._model.name, self._n) as watch:
            stream = engine.generate(
                self._tokenized(prompt), params, self._name(p), self._body.priority, events.prefill
            )
            async with aclosing(stream) as chunks:
                async for chunk in chunks:
                    first = counter.is_first(chunk)
                    text = "" if self._scores_only else chunk.text
                    if first and self._body.echo:
                        text = _text_of(engine.llm, prompt) + text
                    choice = _choice(p * self._n + chunk.index, text, chunk.finish_reason, chunk.stop_reason)
                    if chunk.logprobs is not None:
                        tokens = list(zip(chunk.token_ids, chunk.logprobs, strict=True))
                        places = offsets[chunk.index].of(chunk.token_ids)
                        choice["logprobs"] = self._logprobs(engine.llm, tokens, places)
                    if text or chunk.logprobs or chunk.finish_reason is not None:
                        events.event({**self._head(), "choices": [choice]})
                    if chunk.finish_reason is not None:
                        watch.ended(chunk.metrics, chunk.finish_reason)
        return counter

    def _tokenized(self, prompt: TextOrIds) -> Prompt:
        """A prompt with what the request says of its tokens."""
        if isinstance(prompt, str) and self._body.add_special_tokens is not None:
            return {"prompt": prompt, "add_special_tokens": self._body.add_special_tokens}
        return prompt

    def _engine(self, progress: Progress | None = None) -> AbstractAsyncContextManager[AsyncEngine]:
        return self._state.engine(self._model, self._body, self._answers, progress)

    def _choices(self, llm: LLM, p: int, prompt: TextOrIds, output: RequestOutput) -> list[dict[str, Any]]:
        choices = []
        for answer in output.outputs:
            text = answer.text
            tokens: list[tuple[int, Logprobs | None]] = list(zip(answer.token_ids, answer.logprobs or [], strict=False))
            if self._scores_only:
                text, tokens = "", []
            if self._body.echo:
                text = _text_of(llm, prompt) + text
                tokens = [*zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False), *tokens]
            choice = _choice(p * self._n + answer.index, text, answer.finish_reason, answer.stop_reason)
            if self._body.logprobs is not None:
                places = _places_in_prompt(llm, prompt, output.prompt_token_ids) if self._body.echo else []
                places += self._offsets(llm, prompt).of(answer.token_ids)
                choice["logprobs"] = self._logprobs(llm, tokens, places[: len(tokens)])
            choices.append(choice)
        return choices

    def _logprobs(
        self, llm: LLM, tokens: SequenceOf[tuple[int, Logprobs | None]], places: SequenceOf[int]
    ) -> dict[str, Any]:
        names = [_spelled(llm, token, row) for token, row in tokens]
        return completion_logprobs(tokens, names, self._body.logprobs or 0, places)

    def _offsets(self, llm: LLM, prompt: TextOrIds) -> TextOffsets:
        """The places of an answer's tokens, behind the prompt where that is part of the text."""
        start = len(_text_of(llm, prompt)) if self._body.echo else 0
        skips = self._body.skip_special_tokens is not False
        continues = isinstance(prompt, str)
        detokenizer = llm.tokenizer.detokenizer(skips, continuation=continues) if llm.tokenizer else None
        return TextOffsets(detokenizer, start)

    def _name(self, p: int) -> str:
        """The request id of a prompt in the engine."""
        return self._id if len(self._prompts) == 1 else f"{self._id}-{p}"

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model.name}


def _choice(index: int, text: str, reason: str | None, stop_reason: str | int | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": stop_reason}


def _text_of(llm: LLM, prompt: TextOrIds) -> str:
    if isinstance(prompt, str) or llm.tokenizer is None:
        return prompt if isinstance(prompt, str) else ""
    return llm.tokenizer.decode(prompt, skip_special_tokens=False)


def _places_in_prompt(llm: LLM, prompt: TextOrIds, ids: list[int]) -> list[int]:
    """Where in a prompt its tokens begin; the BOS that a text is given is not in it."""
    tokenizer, start = llm.tokenizer, 0
    if tokenizer is None:
        return [0] * len(ids)
    if isinstance(prompt, str) and ids[:1] == [tokenizer.bos_token_id]:
        bos = tokenizer.special_tokens["bos_token"]
        start = 0 if prompt.startswith(bos) else -len(bos)
    return TextOffsets(tokenizer.detokenizer(skip_special_tokens=False), start).of(ids)


def _spelled(llm: LLM, token: int, row: Logprobs | None) -> str:
    if row is not None:
        return row[token].decoded_token or ""
    return llm.tokenizer.decode([token], skip_special_tokens=False, continuation=True) if llm.tokenizer else ""


async def _together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; where one fails the others are cancelled, and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
