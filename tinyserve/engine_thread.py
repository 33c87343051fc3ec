"""The thread that steps an engine, and the only one that runs its kernels; everybody else sends notes and gets news.

Moves ints, like the engine. News are handed over as they are: whoever gets them makes text of them, in a thread of
their own, while the next step runs.
"""

import ctypes
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from queue import SimpleQueue
from threading import RLock, Thread, current_thread
from typing import NamedTuple, Protocol, TypeVar

from tinyserve.engine import Engine, EngineStats
from tinyserve.errors import EngineDeadError, TinyserveError
from tinyserve.scheduling.sequence import Logprobs, Sequence

T = TypeVar("T")


class Update(NamedTuple):
    """What a step has brought one sequence; after one that has a `finish_reason` comes no other."""

    sequence: Sequence
    num_computed: int = 0  # tokens that are in the cache: how far a prompt is read
    token_id: int | None = None
    time: float = 0.0  # of the token, by `perf_counter`
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    error: BaseException | None = None  # where `finish_reason` is "error"


class Mailbox(Protocol):
    """Where news go: one call a step, in the engine's thread, which must neither wait nor raise."""

    def put(self, updates: list[Update], /) -> None: ...


class _Closing(BaseException):
    """Thrown into a step that nobody waits for any more."""


class EngineThread:
    """An engine at work. Any thread may call any method; only `call` and `close` wait for a step to end."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._notes: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._mailboxes: dict[Sequence, Mailbox] = {}  # of sequences that have not ended
        self._calls: set[Future[None]] = set()  # that have no result yet
        # Over what a death ends: whoever comes before it is told, whoever comes after is refused. A stream may be
        # collected at any moment, in a thread that has the lock, and is cancelled then.
        self._lock = RLock()
        self._thread: Thread | None = None
        self._is_closed = False
        self.dead_error: BaseException | None = None

    def submit(self, sequences: SequenceOf[Sequence], mailbox: Mailbox) -> None:
        """Queue sequences that `Engine.make` made; raises EngineDeadError."""

        def take_in() -> None:
            for sequence in sequences:
                self._engine.submit(sequence)

        with self._lock:
            self._start()
            for sequence in sequences:
                self._mailboxes |= dict.fromkeys((sequence, *sequence.forks), mailbox)
            self._notes.put(take_in)

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence before the next step; ending one twice, or in a dead engine, does nothing."""
        with self._lock:
            if sequence in self._mailboxes and self._can_work():
                self._notes.put(lambda: self._end(sequence, reason))

    def call(self, function: Callable[[], T]) -> T:
        """Run a function between two steps, and return what it returns; raises what it raises, or EngineDeadError."""
        results: list[T] = []
        done: Future[None] = Future()

        def run() -> None:
            try:
                results.append(function())
            except Exception as error:
                self._calls.discard(done)
                done.set_exception(error)
            else:
                self._calls.discard(done)
                done.set_result(None)

        with self._lock:
            self._start()
            self._calls.add(done)
            self._notes.put(run)
        done.result()
        return results[0]

    def stats(self) -> EngineStats:
        """What the engine is doing."""
        return self._engine.stats()

    def close(self) -> None:
        """End the thread, in the middle of a step if need be; who waits for news gets an EngineDeadError."""
        with self._lock:
            self._is_closed = True
            thread = self._thread
            self._notes.put(lambda: None)  # wakes it
        if thread is None or thread.ident is None or thread is current_thread():  # or Ctrl-C came while it was started
            return
        thread.join(0.05)
        if thread.is_alive():
            # As Ctrl-C ends a step in the main thread: with the kernel that runs, not with the step.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Closing))
            thread.join(5)  # not for ever: it may wait for kernels that the caller's own thread holds

    def _can_work(self) -> bool:
        return self.dead_error is None and not self._is_closed

    def _start(self) -> None:
        """Have a thread that reads notes. Call it with the lock, and send them before it is given back."""
        if not self._can_work():
            raise self.dead_error or _dead(None)
        if self._thread is None or not self._thread.is_alive():  # not yet, or not in this child of a fork
            self._thread = Thread(target=self._run, name="tinyserve-engine", daemon=True)
            self._thread.start()

    # --- in the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_closed:
                if self._notes.empty() and self._engine.has_work():
                    self._step()
                    if not self._engine.scheduled:  # a text has the blocks, and its next chunk is a note
                        self._notes.get()()
                else:
                    self._notes.get()()
            self._die(None)
        except _Closing:
            self._die(None)
        except BaseException as error:  # a mistake in the engine, not in what it runs
            self._die(error)

    def _step(self) -> None:
        try:
            grown = self._engine.step()
        except Exception as error:  # those it worked for have an answer, and the others go on
            at_work = [sequence for sequence, _ in self._engine.scheduled]
            self._fail(at_work or [*self._engine.running, *self._engine.waiting], error)
            return
        reading = [s for s, _ in self._engine.scheduled if 0 < s.num_computed < len(s.prompt_token_ids)]
        self._deliver([update for s in grown for update in _news(s)] + [Update(s, s.num_computed) for s in reading])

    def _end(self, sequence: Sequence, reason: str) -> None:
        if sequence.finish_reason is None:
            self._engine.finish(sequence, reason)
            self._deliver([Update(sequence, finish_reason=reason)])

    def _fail(self, sequences: SequenceOf[Sequence], error: BaseException) -> None:
        for sequence in sequences:
            self._engine.finish(sequence, "error")
        self._deliver([Update(sequence, finish_reason="error", error=error) for sequence in sequences])

    def _deliver(self, updates: list[Update]) -> None:
        letters: dict[Mailbox, list[Update]] = {}
        for update in updates:
            mailbox = self._mailboxes.get(update.sequence)
            if mailbox is not None:
                letters.setdefault(mailbox, []).append(update)
            if update.finish_reason is not None:
                self._mailboxes.pop(update.sequence, None)
        for mailbox, letter in letters.items():
            mailbox.put(letter)

    def _die(self, error: BaseException | None) -> None:
        with self._lock:
            self.dead_error = _dead(error)
            for call in self._calls:
                call.set_exception(self.dead_error)
            self._calls.clear()
            self._deliver([Update(s, finish_reason="error", error=self.dead_error) for s in self._mailboxes])


def _news(sequence: Sequence) -> list[Update]:
    """One update for each new token, or for why there is none."""
    computed, reason = sequence.num_computed, sequence.finish_reason
    if sequence.error:
        return [Update(sequence, computed, finish_reason=reason, error=TinyserveError(sequence.error))]
    first, sequence.num_delivered = sequence.num_delivered, sequence.num_output
    tokens = sequence.output_token_ids[first:]
    logprobs: SequenceOf[Logprobs | None] = sequence.logprobs[first:] or [None] * len(tokens)
    times = sequence.metrics.token_times[first:]
    ends = [None] * (len(tokens) - 1) + [reason]
    return [Update(sequence, computed, *one) for one in zip(tokens, times, logprobs, ends, strict=True)]


def _dead(error: BaseException | None) -> EngineDeadError:
    dead = EngineDeadError(f"The engine has stopped: {error!r}." if error else "The engine was closed.")
    dead.__cause__ = error
    return dead
