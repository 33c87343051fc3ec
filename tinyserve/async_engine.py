"""An LLM for programs with an event loop: answers as async generators, under vLLM's names.

Makes text in the event loop, of the updates that the engine's thread sends there; neither waits for the other.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from threading import Event
from typing import Any, Self

from tinyserve.engine import EngineStats, Update
from tinyserve.errors import RequestError
from tinyserve.llm import LLM, Message
from tinyserve.sampling_params import BeamSearchParams, SamplingParams, StructuredOutputs
from tinyserve.scheduling.sequence import Sequence
from tinyserve.text.beam_search import BeamSearch, BeamSearchOutput
from tinyserve.text.pooling import EmbeddingOutput
from tinyserve.text.request import RequestOutput, RequestState, StreamChunk, output
from tinyserve.text.validation import Prompt

_MAX_COMPILING = 4  # grammars at a time; others wait, and only those who bring new ones
OnPrefill = Callable[[int, int], None]


class AsyncEngine:
    """Serves many requests at once from one event loop, which must be the same for all of them.

    `model` is an LLM, which may be used beside it, or what LLM takes, with its options.
    """

    def __init__(self, model: LLM | str | PathLike[str], **options: Any):
        self.llm = model if isinstance(model, LLM) else LLM(model, **options)
        self._jobs: dict[object, _Job] = {}
        self._router: UpdateRouter | None = None
        # Texts are read one at a time: those that wait must not take the threads that make requests.
        self._readers = ThreadPoolExecutor(1, "tinyserve-texts")
        self._compilers = ThreadPoolExecutor(_MAX_COMPILING, "tinyserve-grammars")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.shutdown()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        on_prefill: OnPrefill | None = None,
    ) -> AsyncGenerator[StreamChunk, None]:
        """Complete one prompt, yielding each piece of its answers as soon as it is certain; `index` says of which.

        Leaving the loop, `aclose` and a cancelled task end the request before the engine's next step, as does `abort`
        with its `request_id`. `on_prefill` hears of a prompt that takes several steps: tokens read, and tokens in all.
        Raises RequestError for a prompt that cannot be served, EngineDeadError, and why the request failed.
        """
        params = self.llm.resolve(sampling_params)
        if params.best_of is not None and params.best_of > params.n:
            raise RequestError(
                f"best_of is {params.best_of}, and which answers are the likeliest is known at the end.",
                param="best_of",
            )
        with self._job(request_id) as job:
            answers = await self._made(prompt, params, priority)
            async with aclosing(self._run([answers], job, on_prefill)) as updated:
                async for request in updated:
                    yield request.chunk()

    async def complete(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        on_prefill: OnPrefill | None = None,
    ) -> RequestOutput:
        """The answers to one prompt, when all are there; a cancelled task ends the request, too."""
        params = self.llm.resolve(sampling_params)
        with self._job(request_id) as job:
            answers = await self._made(prompt, params, priority)
            await self._complete(answers, job, on_prefill)
        return output(answers, params.n, params.logprobs is not None)

    async def chat(
        self,
        messages: SequenceOf[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        on_prefill: OnPrefill | None = None,
        **options: Any,
    ) -> AsyncGenerator[StreamChunk, None]:
        """The same for a conversation, by the model's own chat template; options are those of `LLM.chat_request`."""
        request = await asyncio.to_thread(self.llm.chat_request, messages, sampling_params, **options)
        async with aclosing(self.generate(*request, request_id, priority, on_prefill)) as answer:
            async for chunk in answer:
                yield chunk

    async def beam_search(
        self, prompt: Prompt, params: BeamSearchParams, request_id: str | None = None
    ) -> BeamSearchOutput:
        """The likeliest answers to a prompt, the best first, as those of `LLM.beam_search`; its beams are requests.

        A cancelled task ends it before the engine's next step. So does `abort`, which lets it return the beams as they
        are, whose finish_reason is "abort".
        """
        search = await asyncio.to_thread(BeamSearch, self.llm, prompt, params)
        with self._job(request_id) as job:
            while search.beams:
                submitted = await asyncio.to_thread(self._requests_of, search)
                async with aclosing(self._run(submitted, job)) as updated:
                    async for _ in updated:
                        pass
                if job.is_aborted:
                    search.abort()
                else:
                    search.advance([request.logprobs for (request,) in submitted])
        return await asyncio.to_thread(search.output)

    async def embed(self, prompts: Prompt | SequenceOf[Prompt], *, normalize: bool = True) -> list[EmbeddingOutput]:
        """Texts as vectors, as those of `LLM.embed`; a cancelled task ends the reading behind its chunk."""
        cancelled = Event()
        read = partial(self.llm.embed, prompts, normalize=normalize, is_cancelled=cancelled.is_set)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, read)
        finally:
            cancelled.set()

    async def abort(self, request_id: str) -> None:
        """End a request; its generator yields a last chunk, whose finish_reason is "abort". Unknown ids do nothing."""
        if request_id in self._jobs:
            self._jobs[request_id].is_aborted = True
            self._cancel(self._jobs[request_id])

    def stats(self) -> EngineStats:
        """What the engine is doing, and what it has done."""
        return self.llm.stats()

    def check_health(self) -> None:
        """Raise EngineDeadError where the engine has stopped."""
        if self.llm.thread.dead_error is not None:
            raise self.llm.thread.dead_error

    def shutdown(self) -> None:
        """End the engine; requests that are open fail with EngineDeadError."""
        self.llm.close()
        self._readers.shutdown(wait=False)
        self._compilers.shutdown(wait=False, cancel_futures=True)

    async def _made(self, prompt: Prompt, params: SamplingParams, priority: int) -> list[RequestState]:
        """The requests for the answers to a prompt."""
        structure = params.structured_outputs
        if structure is not None and not self.llm.knows_grammar(structure):
            await self._compile(structure)
        # A long text takes a tokenizer milliseconds, in which the event loop has others to serve.
        return await asyncio.to_thread(self.llm.make_request, prompt, params, priority)

    async def _complete(self, answers: list[RequestState], job: "_Job", on_prefill: OnPrefill | None) -> None:
        """Have a prompt answered, and wait for all of it: no task is woken for a token."""
        done = asyncio.get_running_loop().create_future()

        def hear(request: RequestState, update: Update) -> None:
            if done.done() or request.finished:
                return
            try:
                self._take(request, update, on_prefill)
            except Exception as error:
                done.set_exception(error)
            else:
                if all(answer.finished for answer in answers):
                    done.set_result(None)

        with self._submitted([answers], job, hear):
            await done

    async def _run(
        self, submitted: list[list[RequestState]], job: "_Job", on_prefill: OnPrefill | None = None
    ) -> AsyncGenerator[RequestState, None]:
        """Have several prompts answered, and yield each answer whenever there is more of it, and when it has ended."""
        queue: asyncio.Queue[tuple[RequestState, Update]] = asyncio.Queue()
        with self._submitted(submitted, job, lambda request, update: queue.put_nowait((request, update))):
            while not all(request.finished for request in job.requests):
                request, update = await queue.get()
                if request.finished:
                    continue
                self._take(request, update, on_prefill)
                if request.has_chunk():
                    yield request

    @contextmanager
    def _submitted(
        self, submitted: list[list[RequestState]], job: "_Job", hear: Callable[[RequestState, Update], None]
    ) -> Iterator[None]:
        """Requests are in the engine as long as the block runs, and `hear` is called with what comes of them."""
        job.requests = [request for answers in submitted for request in answers]
        router = self._router_of_this_loop()
        router.subscribe({request.sequence: partial(hear, request) for request in job.requests})
        try:
            self.llm.thread.submit([answers[0].sequence for answers in submitted], router)
            if job.is_aborted:  # while there was nothing to abort yet
                self._cancel(job)
            yield
        finally:
            router.unsubscribe([request.sequence for request in job.requests])
            self._cancel(job)

    def _take(self, request: RequestState, update: Update, on_prefill: OnPrefill | None) -> None:
        """Add what has come of a request to it; raises the error that has ended it."""
        self.llm.take(request, update)
        request.raise_error()
        if on_prefill is not None and request.is_reading:
            on_prefill(request.num_computed, request.metrics.prompt_tokens)

    async def _compile(self, spec: StructuredOutputs) -> None:
        """Have a grammar compiled, in threads that nobody else waits for; whoever leaves ends the work on it."""
        cancelled = Event()
        compile_ = partial(self.llm.compile_grammar, spec, cancelled.is_set)
        try:
            await asyncio.get_running_loop().run_in_executor(self._compilers, compile_)
        finally:
            cancelled.set()

    def _requests_of(self, search: BeamSearch) -> list[list[RequestState]]:
        return [self.llm.make_request(beam.tokens, search.step) for beam in search.beams]

    @contextmanager
    def _job(self, name: str | None) -> Iterator["_Job"]:
        """What runs under this name, as long as it runs; without one nobody else can find it."""
        if name in self._jobs:
            raise RequestError(
                f"There is a request {name!r} already: give each an id of its own, or none.", param="request_id"
            )
        job = _Job()
        key = name if name is not None else job
        self._jobs[key] = job
        try:
            yield job
        finally:
            del self._jobs[key]

    def _cancel(self, job: "_Job") -> None:
        for request in job.requests:
            self.llm.cancel(request)

    def _router_of_this_loop(self) -> "UpdateRouter":
        loop = asyncio.get_running_loop()
        if self._router is None or self._router.loop is not loop:
            self._router = UpdateRouter(loop, self.llm)
        return self._router


@dataclass(eq=False)
class _Job:
    """What one call asked for: its requests, which those of a beam search's next step replace."""

    requests: list[RequestState] = field(default_factory=list)
    is_aborted: bool = False


class UpdateRouter:
    """An `UpdateSink` that takes the updates of a step over to an event loop in one call, and sorts them there."""

    def __init__(self, loop: asyncio.AbstractEventLoop, llm: LLM):
        self.loop, self._llm = loop, llm
        self._subscribers: dict[Sequence, Callable[[Update], None]] = {}

    def subscribe(self, subscribers: dict[Sequence, Callable[[Update], None]]) -> None:
        """Call these with the updates of sequences."""
        self._subscribers |= subscribers

    def unsubscribe(self, sequences: list[Sequence]) -> None:
        """Drop what comes of these."""
        for sequence in sequences:
            self._subscribers.pop(sequence, None)

    def put(self, updates: list[Update]) -> None:
        """Called in the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self._route, updates)
        except RuntimeError:  # the loop was closed with requests open: nobody will ever ask
            for update in updates:
                self._llm.thread.finish(update.sequence, "abort")

    def _route(self, updates: list[Update]) -> None:
        for update in updates:
            if update.sequence in self._subscribers:
                self._subscribers[update.sequence](update)
