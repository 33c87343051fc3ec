"""The engine: schedule, execute, update; and the thread that steps it. Moves ints, and knows neither text nor arrays.

What runs in a step is the scheduler's business; computing it is a runner's, which is handed in: a fake one is enough to
test every rule. `EngineThread` is the only thread that runs an engine's kernels. Others send it commands, and get
updates through their sinks as they are: text is made of them in other threads, while the next step runs.
"""

import ctypes
import logging
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import replace
from itertools import count
from queue import SimpleQueue
from threading import RLock, Thread, current_thread
from time import perf_counter
from typing import NamedTuple, Protocol, TypeVar

from tinyserve.errors import CacheLostError, ContextLengthError, EngineDeadError, RequestError, TinyserveError
from tinyserve.sampling_params import SamplingParams
from tinyserve.scheduling.scheduler import CacheCopier, Scheduler
from tinyserve.scheduling.sequence import Logprobs, Sampled, Scheduled, Sequence

T = TypeVar("T")

# Multi-step scheduling: for so long a batch that decodes goes on with nobody asked or told in between. Scheduling it
# again, and waking who waits for its tokens, takes as long as a fifth of a small model's step.
MULTI_STEP_SECONDS = 0.01
MAX_LOSSES = 3  # of the cache, one after the other: then it is what is computed that ends processes

logger = logging.getLogger("tinyserve")


class Runner(CacheCopier, Protocol):
    """Computes scheduled tokens."""

    def execute(self, scheduled: list[Scheduled]) -> list[list[Sampled]]:
        """The tokens that follow each sequence: the accepted draft tokens and one more; none in mid-prompt.

        Raises CacheLostError where a part of the cache is gone.
        """

    def recover(self) -> None:
        """After that, wait until all of the cache is there again, and empty; raises EngineDeadError."""


class EngineStats(NamedTuple):
    """What an engine is doing, and what it has done since it was built."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int  # those that only hold cached prefixes among them
    steps: int = 0
    step_seconds: float = 0.0
    requests: int = 0  # that ended
    prompt_tokens: int = 0  # of requests that have begun, and how many of them were in the prefix cache
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0  # that were checked, and how many of them the model would have chosen
    accepted_tokens: int = 0


class Engine:
    """The engine core: makes requests, has them scheduled and computed step by step, appends what was sampled."""

    def __init__(self, runner: Runner, scheduler: Scheduler, eos_token_ids: frozenset[int]):
        self.runner, self.scheduler, self.eos_token_ids = runner, scheduler, eos_token_ids
        self.totals: Counter[str] = Counter()
        self.step_seconds = 0.0
        self._losses = 0  # of the cache, since something was computed
        self._ids = count()

    def add(self, prompt_token_ids: list[int], params: SamplingParams, priority: int = 0) -> Sequence:
        """Queue a request, those of a lower `priority` first; raises RequestError for one that can never be served."""
        sequence = self.make(prompt_token_ids, params, priority)
        self.submit(sequence)
        return sequence

    def make(self, prompt_token_ids: list[int], params: SamplingParams, priority: int = 0) -> Sequence:
        """A request that can be served, not yet queued; any thread may call this. Raises RequestError for any other.

        With `params.n` or `best_of` above 1 the other answers are the sequence's `siblings`.
        """
        max_model_len, blocks = self.scheduler.max_model_len, self.scheduler.blocks
        if not prompt_token_ids:
            raise RequestError(
                "The prompt is empty: it has no tokens, and nothing can follow from nothing.", param="prompt"
            )
        if len(prompt_token_ids) >= max_model_len:
            raise ContextLengthError(
                f"The prompt has {len(prompt_token_ids)} tokens and the context (max_model_len) holds "
                f"{max_model_len}, the answer included: shorten the prompt.",
                param="prompt",
            )
        needed = min(len(prompt_token_ids) + params.max_tokens, max_model_len)
        if blocks.blocks_for(needed) > blocks.num_blocks:
            raise RequestError(
                f"The request can come to {needed} tokens and the cache holds "
                f"{blocks.num_blocks * blocks.block_size}: lower max_tokens, or raise kv_cache_memory.",
                param="max_tokens",
            )
        first, *siblings = (
            Sequence(next(self._ids), list(prompt_token_ids), _params_of_answer(params, i), priority)
            for i in range(params.best_of or params.n)
        )
        first.siblings = siblings
        return first

    def submit(self, sequence: Sequence) -> None:
        """Queue a request that was made."""
        self.scheduler.add(sequence)

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def step(self, may_repeat: Callable[[], bool] = lambda: False) -> list[Sequence]:
        """Run one batch; returns the sequences that gained tokens or failed, finished ones among them.

        While `may_repeat` says so, a batch that decodes is run again for the tokens that follow, for
        MULTI_STEP_SECONDS at most. Does nothing while prefill-only texts (text/pooling.py) hold the blocks that the
        waiting sequences need. Raises EngineDeadError.
        """
        return self.compute(lambda: self._step(may_repeat))

    def compute(self, function: Callable[[], T]) -> T:
        """What a function that runs the model returns; where the cache was lost, all begins again.

        Raises EngineDeadError where it is lost for good.
        """
        while True:
            try:
                result = function()
                is_empty = isinstance(result, list) and not result
                if not is_empty:  # in mid-prompt, what a step computes may be asked for by the next one
                    self._losses = 0
                return result
            except CacheLostError as error:
                self._losses += 1
                logger.warning("%s All that run begin again.", error)
                self.scheduler.forget()
                if self._losses > MAX_LOSSES:
                    raise EngineDeadError(f"{error} That was {self._losses} times in a row.") from error
                self.runner.recover()

    def _step(self, may_repeat: Callable[[], bool]) -> list[Sequence]:
        start = begin = perf_counter()
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return []
        while True:
            try:
                sampled = self.runner.execute(scheduled)
                for work, tokens in zip(scheduled, sampled, strict=True):
                    self._update(work, tokens)
            except CacheLostError:
                raise  # what is requeued is more than was scheduled
            except BaseException:
                self.scheduler.requeue_failed(scheduled)
                raise
            end = perf_counter()
            seconds, begin = end - begin, end
            self.scheduler.record_step(seconds)
            self.totals["steps"] += 1
            self.step_seconds += seconds
            in_time = end + seconds <= start + MULTI_STEP_SECONDS
            if not (in_time and self.scheduler.can_repeat() and may_repeat()):
                return [work.sequence for work, tokens in zip(scheduled, sampled, strict=True) if tokens]

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence, wherever it is, and give back its blocks and its slot; ending one twice does nothing."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        self.totals["requests"] += 1
        self.scheduler.remove(sequence, keep_state=reason != "error")

    def stats(self) -> EngineStats:
        """What it is doing; any thread may ask, and gets counts that may be a step apart."""
        scheduler = self.scheduler
        return EngineStats(
            len(scheduler.running), len(scheduler.waiting), scheduler.blocks.num_blocks, scheduler.blocks.num_free,
            step_seconds=self.step_seconds, prompt_tokens=scheduler.num_prompt_tokens,
            cached_tokens=scheduler.num_cached_tokens, preemptions=scheduler.num_preemptions, **self.totals,
        )  # fmt: skip

    def _update(self, work: Scheduled, sampled: list[Sampled]) -> None:
        """Take in what a step has computed of a sequence: its accepted draft tokens and one more, up to its end."""
        sequence = work.sequence
        if sampled and sampled[0].error is not None:
            sequence.error, sequence.is_request_error = sampled[0].error, sampled[0].is_request_error
            # The error may come from earlier chunks: drop them from the prefix cache.
            self.scheduler.blocks.evict(sequence.cache.block_table)
            self.finish(sequence, "error")
            return
        reason, length = None, sequence.num_output
        for one in sampled:
            sequence.append(one.token_id, one.logprobs)
            if reason := self._finish_reason(sequence):
                break
        num_new, num_draft_tokens = sequence.num_output - length, len(work.draft_tokens)
        num_accepted_tokens = min(max(0, len(sampled) - 1), num_new)  # an accepted one may have ended it
        self.totals["output_tokens"] += num_new
        if num_draft_tokens:
            self.totals.update(draft_tokens=num_draft_tokens, accepted_tokens=num_accepted_tokens)
        self.scheduler.update(work, num_accepted_tokens)
        if reason is not None:
            self.finish(sequence, reason)

    def _finish_reason(self, sequence: Sequence) -> str | None:
        token, params, length = sequence.token_ids[-1], sequence.params, len(sequence.token_ids)
        if token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos):
            return "stop"
        if sequence.num_output >= params.max_tokens or length >= self.scheduler.max_model_len:
            return "length"
        return None


class Update(NamedTuple):
    """What a step has brought one sequence; one with a `finish_reason` is the last."""

    sequence: Sequence
    num_computed: int = 0  # tokens that are in the cache: how far a prompt is read
    token_id: int | None = None
    time: float = 0.0  # of the token, by `perf_counter`
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    error: BaseException | None = None  # where `finish_reason` is "error"


class UpdateSink(Protocol):
    """Where updates go, those of a step or of a few: in the engine's thread, which must neither wait nor raise."""

    def put(self, updates: list[Update], /) -> None: ...


class _Closing(BaseException):
    """Raised in the engine's thread by `close`, to end a running step."""


class EngineThread:
    """An engine at work. Any thread may call any method; only `call` and `close` wait for a step to end."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._sinks: dict[Sequence, UpdateSink] = {}  # of sequences that have not ended
        self._calls: set[Future[None]] = set()  # pending ones
        # For commands and sinks: those before the engine's death get an error as their last update, those after it are
        # refused. Reentrant, as a stream may be garbage-collected, and is cancelled then, in a thread that has it.
        self._lock = RLock()
        self._thread: Thread | None = None
        self._is_closed = False
        self.dead_error: BaseException | None = None

    def submit(self, sequences: SequenceOf[Sequence], sink: UpdateSink) -> None:
        """Queue sequences that `Engine.make` made; raises EngineDeadError."""

        def submit() -> None:
            for sequence in sequences:
                self._engine.submit(sequence)

        with self._lock:
            self._start()
            for sequence in sequences:
                self._sinks |= dict.fromkeys((sequence, *sequence.siblings), sink)
            self._commands.put(submit)

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence before the next step; ending one twice, or in a dead engine, does nothing."""
        with self._lock:
            if sequence in self._sinks and self._can_work():
                self._commands.put(lambda: self._end(sequence, reason))

    def call(self, function: Callable[[], T]) -> T:
        """Run a function between two steps, and return what it returns; raises what it raises, or EngineDeadError.

        Where the cache is lost while it runs the model, it is run again (`Engine.compute`).
        """
        results: list[T] = []
        done: Future[None] = Future()

        def run() -> None:
            try:
                results.append(self._engine.compute(function))
            except EngineDeadError:  # and so ends this thread, and this call with it
                raise
            except Exception as error:
                self._calls.discard(done)
                done.set_exception(error)
            else:
                self._calls.discard(done)
                done.set_result(None)

        with self._lock:
            self._start()
            self._calls.add(done)
            self._commands.put(run)
        done.result()
        return results[0]

    def stats(self) -> EngineStats:
        """What the engine is doing."""
        return self._engine.stats()

    def close(self) -> None:
        """End the thread, in the middle of a step if need be; who waits for updates gets an EngineDeadError."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
            self._commands.put(lambda: None)  # wakes it
        if thread is None or thread.ident is None or thread is current_thread():  # or Ctrl-C came while it was started
            return
        thread.join(0.05)
        if thread.is_alive():
            # Raised in that thread when the running kernel returns, as Ctrl-C is in the main thread.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Closing))
            thread.join(5)  # not for ever: it may wait for kernels that the caller's own thread holds

    def _can_work(self) -> bool:
        return self.dead_error is None and not self._is_closed

    def _start(self) -> None:
        """Have a thread that runs commands. Call it with the lock, and send them before it is given back."""
        if not self._can_work():
            raise self.dead_error or _dead(None)
        if self._thread is None or not self._thread.is_alive():  # not yet, or not in this child of a fork
            self._thread = Thread(target=self._run, name="tinyserve-engine", daemon=True)
            self._thread.start()

    # --- in the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_closed:
                if self._commands.empty() and self._engine.has_work():
                    self._step()
                    if not self._engine.scheduler.scheduled:  # pooling holds the blocks: wait for its command
                        self._commands.get()()
                else:
                    self._commands.get()()
            self._die(None)
        except _Closing:
            self._die(None)
        except BaseException as error:  # a mistake in the engine, not in what it runs
            self._die(error)

    def _step(self) -> None:
        try:
            grown = self._engine.step(may_repeat=self._commands.empty)  # until a command comes
        except EngineDeadError:
            raise
        except Exception as error:  # those that were scheduled fail, and the others go on
            scheduler = self._engine.scheduler
            scheduled = [work.sequence for work in scheduler.scheduled]
            self._fail(scheduled or [*scheduler.running, *scheduler.waiting], error)
            return
        scheduled = [work.sequence for work in self._engine.scheduler.scheduled]
        in_prefill = [s for s in scheduled if 0 < s.cache.num_computed < len(s.prompt_token_ids)]
        updates = [update for sequence in grown for update in _updates_of(sequence)]
        self._deliver(updates + [Update(sequence, sequence.cache.num_computed) for sequence in in_prefill])

    def _end(self, sequence: Sequence, reason: str) -> None:
        if sequence.finish_reason is None:
            self._engine.finish(sequence, reason)
            self._deliver([Update(sequence, finish_reason=reason)])

    def _fail(self, sequences: SequenceOf[Sequence], error: BaseException) -> None:
        for sequence in sequences:
            self._engine.finish(sequence, "error")
        self._deliver([Update(sequence, finish_reason="error", error=error) for sequence in sequences])

    def _deliver(self, updates: list[Update]) -> None:
        by_sink: dict[UpdateSink, list[Update]] = {}
        for update in updates:
            sink = self._sinks.get(update.sequence)
            if sink is not None:
                by_sink.setdefault(sink, []).append(update)
            if update.finish_reason is not None:
                self._sinks.pop(update.sequence, None)
        for sink, its_updates in by_sink.items():
            sink.put(its_updates)

    def _die(self, error: BaseException | None) -> None:
        with self._lock:
            self.dead_error = _dead(error)
            for call in self._calls:
                call.set_exception(self.dead_error)
            self._calls.clear()
            self._deliver([Update(s, finish_reason="error", error=self.dead_error) for s in self._sinks])


def _updates_of(sequence: Sequence) -> list[Update]:
    """One update for each new token, or one with the error."""
    computed, reason = sequence.cache.num_computed, sequence.finish_reason
    if sequence.error:
        return [Update(sequence, computed, finish_reason=reason, error=_error_of(sequence, sequence.error))]
    first, sequence.num_delivered = sequence.num_delivered, sequence.num_output
    tokens = sequence.output_token_ids[first:]
    logprobs: SequenceOf[Logprobs | None] = sequence.logprobs[first:] or [None] * len(tokens)
    times = sequence.metrics.token_times[first:]
    ends = [None] * (len(tokens) - 1) + [reason]
    return [Update(sequence, computed, *one) for one in zip(tokens, times, logprobs, ends, strict=True)]


def _error_of(sequence: Sequence, message: str) -> TinyserveError:
    if not sequence.is_request_error:
        return TinyserveError(message)
    return RequestError(message, param=None if sequence.matcher is None else "structured_outputs")


def _dead(error: BaseException | None) -> EngineDeadError:
    why = str(error) if isinstance(error, EngineDeadError) else repr(error)
    dead = EngineDeadError(f"The engine has stopped: {why.rstrip('.')}." if error else "The engine was closed.")
    dead.__cause__ = error
    return dead


def _params_of_answer(params: SamplingParams, index: int) -> SamplingParams:
    """Each answer to a prompt draws from a stream of its own: the seed and the answer's number, as in vLLM."""
    return params if params.seed is None else replace(params, seed=params.seed + index)
