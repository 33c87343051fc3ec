"""The engine's thread with a runner that computes nothing: updates, failures, death; nobody waits for ever."""

import signal
import threading
import time
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest
from fakes import FakeRunner

from tinyserve.engine import Engine, EngineThread, Update
from tinyserve.errors import EngineDeadError
from tinyserve.sampling_params import SamplingParams
from tinyserve.scheduling.block_manager import BlockManager
from tinyserve.scheduling.scheduler import Scheduler
from tinyserve.scheduling.sequence import Scheduled, Sequence

pytestmark = pytest.mark.fast

DEADLINE = 10.0  # seconds until something that never comes is missed

Sink = SimpleQueue[list[Update]]


class Gate(FakeRunner):
    """A runner whose steps wait until they are let through."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.entered = threading.Event(), threading.Event()
        self.open.set()
        self.error: BaseException | None = None

    def execute(self, scheduled: list[Scheduled]) -> Any:
        self.entered.set()
        while not self.open.is_set():
            time.sleep(0.001)
        if self.error is not None:
            raise self.error
        return super().execute(scheduled)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def engine(gate: Gate) -> Engine:
    return Engine(gate, Scheduler(gate, BlockManager(64, 16), 512, range(4), 32), frozenset({99}))


@pytest.fixture
def thread(engine: Engine) -> Iterator[EngineThread]:
    thread = EngineThread(engine)
    yield thread
    thread.close()


def make(engine: Engine, tokens: int = 5, max_tokens: int = 3, **options: Any) -> Sequence:
    return engine.make([7] * tokens, SamplingParams(max_tokens=max_tokens, **options))


def read(sink: Sink, *sequences: Sequence) -> dict[Sequence, list[Update]]:
    """All updates of these sequences up to their last."""
    updates_of: dict[Sequence, list[Update]] = {sequence: [] for sequence in sequences}
    while not all(updates and updates[-1].finish_reason for updates in updates_of.values()):
        for update in sink.get(timeout=DEADLINE):
            updates_of[update.sequence].append(update)
    return updates_of


def test_updates_of_each_step(thread: EngineThread, engine: Engine, gate: Gate) -> None:
    """How far a prompt is read, then each token; one call a step to each sink."""
    sink, other = Sink(), Sink()
    long, short, apart = make(engine, 70), make(engine, 3, 4), make(engine)
    gate.open.clear()
    thread.submit([apart], other)
    thread.submit([long, short], sink)
    gate.open.set()
    updates_of = read(sink, long, short)
    assert [update.num_computed for update in updates_of[long] if update.token_id is None][-1] >= 32
    assert [update.token_id for update in updates_of[long] if update.token_id is not None] == [1, 1, 1]
    assert [update.token_id for update in updates_of[short]] == [1] * 4
    assert [update.finish_reason for update in updates_of[short]] == [None] * 3 + ["length"]
    assert [update.time for update in updates_of[short]] == short.metrics.token_times
    assert read(other, apart)[apart][-1].finish_reason == "length"
    assert sink.empty() and other.empty() and not thread._sinks
    stats = thread.call(thread.stats)
    assert (stats.requests, stats.output_tokens, stats.prompt_tokens) == (3, 10, 78)
    assert stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks == 64
    assert stats.steps == len(gate.batches) and stats.step_seconds > 0


def test_nobody_waits_for_multi_step_scheduling(
    thread: EngineThread, engine: Engine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends when a command comes; updates of several steps are one call, an update for each token."""
    monkeypatch.setattr("tinyserve.engine.MULTI_STEP_SECONDS", 1000.0)
    sink, other, execute = Sink(), Sink(), gate.execute
    sequence, newcomer = make(engine, max_tokens=60), make(engine)

    def interrupted(scheduled: list[Scheduled]) -> Any:
        if len(gate.batches) == 20:
            thread.submit([newcomer], other)
        return execute(scheduled)

    monkeypatch.setattr(gate, "execute", interrupted)
    thread.submit([sequence], sink)
    calls = [sink.get(timeout=DEADLINE) for _ in range(4)]
    # The prompt of 5; its block's other tokens; a block's; and what there was of the next one's.
    assert [len(updates) for updates in calls] == [1, 11, 8 + 1, 1]
    assert [update.time for updates in calls for update in updates] == sequence.metrics.token_times[:22]
    assert len(gate.batches[20]) == 1 and gate.batches[21] == [(sequence.request_id, 1), (newcomer.request_id, 5)]
    read(other, newcomer)
    read(sink, sequence)


def test_abort_while_a_step_runs(thread: EngineThread, engine: Engine, gate: Gate) -> None:
    """While a step runs: running, waiting, and both answers of one request."""
    sink = Sink()
    sequences = [make(engine, max_tokens=400) for _ in range(5)]
    several = make(engine, max_tokens=400, n=2)
    everybody = [*sequences, several, *several.siblings]
    gate.open.clear()
    thread.submit([*sequences, several], sink)
    assert gate.entered.wait(DEADLINE)
    for sequence in everybody:
        thread.finish(sequence, "abort")
        thread.finish(sequence, "abort")
    gate.open.set()
    updates_of = read(sink, *everybody)
    assert {updates[-1].finish_reason for updates in updates_of.values()} == {"abort"}
    assert max(len(updates) for updates in updates_of.values()) <= 2, "cancelled within one step"
    thread.call(lambda: None)
    assert sink.empty() and not engine.has_work() and engine.scheduler.blocks.num_free == 64
    thread.finish(sequences[0], "abort")  # changes nothing


def test_engine_failure_in_a_step(thread: EngineThread, engine: Engine, gate: Gate) -> None:
    """Those it worked for are told why; those who wait are served, and so is whoever comes later."""
    sink = Sink()
    doomed = [make(engine) for _ in range(4)]  # as many as run at once
    waiting = make(engine)
    gate.error = ValueError("a kernel that does not work")
    gate.open.clear()
    thread.submit([*doomed, waiting], sink)
    assert gate.entered.wait(DEADLINE)
    gate.open.set()
    failed_first = sink.get(timeout=DEADLINE)
    gate.error = None
    assert {update.sequence for update in failed_first} <= {*doomed, waiting}
    updates_of = read(sink, *({*doomed, waiting} - {update.sequence for update in failed_first}))
    failed = [*failed_first, *(updates[-1] for updates in updates_of.values() if updates[-1].error)]
    assert all(update.finish_reason == "error" and "does not work" in str(update.error) for update in failed)
    assert {update.sequence for update in failed} >= set(doomed)
    late = make(engine)
    thread.submit([late], sink)
    assert read(sink, late)[late][-1].finish_reason == "length"
    assert engine.scheduler.blocks.num_free == 64 and thread.dead_error is None


def test_engine_failure_while_scheduling(thread: EngineThread, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nobody knows whose fault it is, and everybody is told, rather than that it fails again for ever."""
    sink = Sink()

    def fail() -> None:
        raise MemoryError("no room for a copy")

    monkeypatch.setattr(engine.scheduler, "schedule", fail)
    sequences = [make(engine) for _ in range(6)]
    thread.submit(sequences, sink)
    assert {type(updates[-1].error) for updates in read(sink, *sequences).values()} == {MemoryError}


def test_engine_death_fails_all_requests(thread: EngineThread, engine: Engine, gate: Gate) -> None:
    """A mistake of the engine's own: those in it, a call that waits, and whoever comes later."""
    sink, caught = Sink(), []
    sequences = [make(engine, max_tokens=400) for _ in range(6)]

    def call() -> None:
        with pytest.raises(EngineDeadError, match="the end"):
            thread.call(lambda: None)
        caught.append(True)

    gate.open.clear()
    thread.submit(sequences, sink)
    assert gate.entered.wait(DEADLINE)
    caller = threading.Thread(target=call)
    caller.start()
    while not thread._calls:
        time.sleep(0.001)
    gate.error = SystemExit("the end")  # no Exception
    gate.open.set()
    updates_of = read(sink, *sequences)
    assert all(isinstance(updates[-1].error, EngineDeadError) for updates in updates_of.values())
    caller.join(DEADLINE)
    assert caught == [True]
    for refused in (lambda: thread.submit([make(engine)], sink), lambda: thread.call(lambda: None)):
        with pytest.raises(EngineDeadError, match=r"has stopped.*the end"):
            refused()
    thread.finish(sequences[0], "abort")
    assert isinstance(thread.dead_error.__cause__, SystemExit)


def test_closing_in_the_middle_of_a_step(thread: EngineThread, engine: Engine, gate: Gate) -> None:
    sink = Sink()
    sequence = make(engine)
    gate.open.clear()
    thread.submit([sequence], sink)
    assert gate.entered.wait(DEADLINE)
    thread.close()
    assert not thread._thread.is_alive()
    assert isinstance(read(sink, sequence)[sequence][-1].error, EngineDeadError)
    with pytest.raises(EngineDeadError, match="was closed"):
        thread.submit([make(engine)], sink)
    thread.close()


def test_closing_what_never_worked(engine: Engine) -> None:
    EngineThread(engine).close()


def test_closing_after_ctrl_c_while_the_thread_is_started(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not started cannot be joined, which a process said at its end."""
    thread = EngineThread(engine)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", lambda _: signal.raise_signal(signal.SIGINT))
        thread.submit([make(engine)], Sink())
    thread.close()
    assert not thread._thread.is_alive()


def test_a_call_runs_between_steps(thread: EngineThread, engine: Engine, gate: Gate) -> None:
    gate.open.clear()
    thread.submit([make(engine)], Sink())
    assert gate.entered.wait(DEADLINE)
    threading.Timer(0.05, gate.open.set).start()
    assert thread.call(lambda: (threading.current_thread().name, len(gate.batches))) == ("tinyserve-engine", 1)
    with pytest.raises(KeyError, match="of the caller"):
        thread.call(lambda: {}["of the caller"])
    assert thread.call(lambda: 3) == 3
