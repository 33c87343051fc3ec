"""The threads that run programs: who does what, in which order, and how they sleep, wake and end."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tinyserve.tensor import _jit
from tinyserve.tensor.arena import Arena
from tinyserve.tensor.native import fetch_add, load_word, yield_processor
from tinyserve.tensor.program import Program, capture, instruction
from tinyserve.tensor.thread_pool import SPLIT, ThreadPool, from_the_end, next_items, own_items, pool

COUNTS = [0, 1, 5, 1000]
THREADS = [1, 2, 3, 7]


@pytest.fixture(autouse=True)
def any_number_of_threads() -> Iterator[None]:
    yield
    _jit.set_threads(None)


@instruction
def count_shared(team, done, by):
    first, last = next_items(team, done.size)
    while first < last:
        for i in range(first, last):
            fetch_add(done.ctypes.data + 8 * i, 1)
            by[i] = team.thread
        first, last = next_items(team, done.size)


@instruction
def count_owned(team, done, by):
    first, last = own_items(team, done.size)
    for i in range(first, last):
        fetch_add(done.ctypes.data + 8 * i, 1)
        by[i] = team.thread


@instruction
def count_from_the_end(team, done, by):
    first, last = next_items(team, done.size)
    while first < last:
        for i in range(first, last):
            item = from_the_end(team, done.size, i)
            fetch_add(done.ctypes.data + 8 * item, 1)
            by[item] = team.thread
        first, last = next_items(team, done.size)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "kernel", [count_shared, count_owned, count_from_the_end], ids=["next_items", "own_items", "from_the_end"]
)
def test_every_item_is_done_once(kernel, count: int, threads: int) -> None:
    _jit.set_threads(threads)
    done, by = np.zeros(count, np.int64), np.empty(count, np.int64)
    with capture(Arena()) as program:
        for _ in range(20):
            kernel(done, by)
    for run in range(1, 11):
        program.run()
        np.testing.assert_array_equal(done, 20 * run)
    assert ((by >= 0) & (by < threads)).all()
    if kernel is count_owned and count >= threads:
        assert set(by) == set(range(threads))


@instruction
def next_generation(team, before, after):
    """Each number is made of three that other threads may have written."""
    size = before.size
    first, last = next_items(team, size)
    while first < last:
        for i in range(first, last):
            after[i] = before[i - 1] + 3 * before[i] + before[(i + 1) % size] + 1
        first, last = next_items(team, size)


@instruction
def next_generation_of_own(team, before, after):
    size = before.size
    first, last = own_items(team, size)
    for i in range(first, last):
        after[i] = before[i - 1] + 3 * before[i] + before[(i + 1) % size] + 1


def generations(count: int, numbers: np.ndarray) -> np.ndarray:
    for _ in range(count):
        numbers = np.roll(numbers, 1) + 3 * numbers + np.roll(numbers, -1) + 1
    return numbers


@pytest.mark.parametrize(("threads", "steps"), [(1, 4000), (2, 4000), (5, 4000), (40, 200)])
def test_an_instruction_sees_all_that_the_one_before_wrote(threads: int, steps: int) -> None:
    """On more threads than there are processors, too: numbers wrap around, and one late write changes all."""
    _jit.set_threads(threads)
    start = np.random.default_rng(0).integers(-(2**62), 2**62, 96)
    a, b = start.copy(), np.empty_like(start)
    with capture(Arena()) as program:
        for step in range(steps // 2):
            kernel = next_generation if step % 3 else next_generation_of_own
            kernel(a, b)
            kernel(b, a)
    expected = start
    for _ in range(3):
        program.run()
        expected = generations(steps // 2 * 2, expected)
        np.testing.assert_array_equal(a, expected)


def test_programs_of_other_numbers_of_threads_follow_each_other() -> None:
    """A thread that is late from one program is not taken for one of the next."""
    start = np.arange(96)
    a, b = start.copy(), np.empty_like(start)
    order = np.random.default_rng(1).choice([1, 2, 3, 7], 600).tolist()
    for threads in order:
        _jit.set_threads(threads)
        next_generation(a, b)
        next_generation(b, a)
    np.testing.assert_array_equal(a, generations(2 * len(order), start))


@instruction
def count_calls(team, calls):
    fetch_add(calls.ctypes.data + 8 * team.thread, 1)


def test_every_thread_runs_a_program_once_though_empty_ones_come_before() -> None:
    """Who is called to an empty one would wake when the next one runs, and take part in that twice."""
    _jit.set_threads(20)
    calls, empty = np.zeros(20, np.int64), Program()
    for run in range(1, 101):
        for _ in range(3):
            empty.run()
        count_calls(calls)
        np.testing.assert_array_equal(calls, run)


@instruction
def with_a_slow_thread(team, done, by, finished, waited):
    """Thread 0 goes on only when all items but its first ones are done; it gives up after some seconds."""
    first, last = next_items(team, done.size)
    while first < last:
        if team.thread == 0:
            while load_word(finished.ctypes.data) < done.size - (last - first) and waited[0] < 10_000_000:
                waited[0] += 1
                yield_processor()
        for i in range(first, last):
            done[i] += 1
            by[i] = team.thread
        fetch_add(finished.ctypes.data, last - first)
        first, last = next_items(team, done.size)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_what_a_slow_thread_has_not_begun_is_done_by_others(threads: int) -> None:
    _jit.set_threads(threads)
    done, by = np.zeros(1000, np.int64), np.empty(1000, np.int64)
    finished, waited = np.zeros(1, np.int64), np.zeros(1, np.int64)
    with_a_slow_thread(done, by, finished, waited)
    assert waited[0] < 10_000_000
    assert (done == 1).all()
    assert (by == 0).sum() <= 1000 // threads // SPLIT


def test_python_threads_that_run_programs_at_once_do_not_disturb_each_other() -> None:
    def work(threads: int) -> None:
        _jit.set_threads(threads)
        start = np.arange(50 + threads)
        a, b = start.copy(), np.empty_like(start)
        with capture(Arena()) as program:
            for _ in range(10):
                next_generation(a, b)
                next_generation(b, a)
        for _ in range(100):
            program.run()
        right[threads] = bool((a == generations(2000, start)).all())

    right: dict[int, bool] = {}
    workers = [threading.Thread(target=work, args=(threads,)) for threads in (1, 2, 3, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert right == {1: True, 2: True, 3: True, 5: True}


def test_a_pool_that_was_closed_begins_again() -> None:
    _jit.set_threads(3)
    done, by = np.zeros(1000, np.int64), np.empty(1000, np.int64)
    for run in range(1, 4):
        count_shared(done, by)
        np.testing.assert_array_equal(done, run)
        threads = list(pool()._threads)
        assert len(threads) >= 2
        pool().close()
        assert not any(thread.is_alive() for thread in threads)


def test_a_thread_that_cannot_begin_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when Ctrl-C comes while threads are started."""
    started = []

    def start(thread: threading.Thread) -> None:
        if started:
            raise KeyboardInterrupt
        started.append(thread)
        begin(thread)

    begin = threading.Thread.start
    done, by = np.zeros(1000, np.int64), np.empty(1000, np.int64)
    pool().close()
    monkeypatch.setattr(threading.Thread, "start", start)
    _jit.set_threads(4)
    with pytest.raises(KeyboardInterrupt):
        count_shared(done, by)
    monkeypatch.undo()
    assert pool()._threads == []
    assert not started[0].is_alive()
    assert not done.any()
    count_shared(done, by)
    assert (done == 1).all()


def test_a_pool_without_threads_closes() -> None:
    ThreadPool().close()


@instruction
def never_end(team, x):
    while x < 1:
        yield_processor()


# --- in processes of their own ----------------------------------------------------------------------------------------

COMMON = """
import os, signal, sys, threading, time
import numpy as np
from test_thread_pool import generations, never_end, next_generation
from tinyserve.tensor import _jit
from tinyserve.tensor.arena import Arena
from tinyserve.tensor.program import Program, capture

def program_of(instructions, threads):
    _jit.set_threads(threads)
    a, b = np.arange(96), np.empty(96, np.int64)
    with capture(Arena()) as program:
        for _ in range(instructions // 2):
            next_generation(a, b)
            next_generation(b, a)
    return program, a

def check(threads):
    program, a = program_of(200, threads)
    program.run()
    assert (a == generations(200, np.arange(96))).all()
"""


def python(code: str) -> tuple[str, float]:
    """What a fresh interpreter prints, and when it had ended, in seconds of `time.monotonic`."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "support")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *sys.path])}
    command = [sys.executable, "-c", COMMON + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    ended = time.monotonic()
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.strip(), ended


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_the_child_of_a_fork_has_threads_of_its_own() -> None:
    """Whether or not another thread was running a program, which no longer exists in the child."""
    code = """
import warnings
warnings.simplefilter("ignore")  # that a process of several threads forks
check(3)
program, _ = program_of(200, 2)
busy = True

def run():
    while busy:
        program.run()

worker = threading.Thread(target=run)
for number in range(12):
    if number == 6:
        worker.start()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        check(3)
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
busy = False
check(3)
worker.join() if worker.ident else None
print("fine")
"""
    assert python(code)[0] == "fine"


def test_ctrl_c_ends_a_program_between_programs() -> None:
    code = """
signal.signal(signal.SIGINT, signal.default_int_handler)
check(3)
program, a = program_of(20_000, 3)
runs = 0
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    while True:
        program.run()
        runs += 1
except KeyboardInterrupt:
    pass
check(3)
check(2)
print("fine")
"""
    assert python(code)[0] == "fine"


@pytest.mark.parametrize(
    ("then", "seconds"),
    [
        pytest.param("", 2, id="threads look"),
        pytest.param("time.sleep(0.3)", 2, id="threads sleep"),
        pytest.param("start(run_programs)", 3, id="a daemon runs programs"),
        pytest.param("start(lambda: never_end(0))", 3, id="a daemon runs a program that does not end"),
    ],
)
def test_a_process_ends_promptly(then: str, seconds: float) -> None:
    code = f"""
def run_programs():
    program, _ = program_of(1000, 3)
    while True:
        program.run()

def start(target):
    threading.Thread(target=target, daemon=True).start()
    time.sleep(0.5)

check(3)
{then}
print(time.monotonic())
"""
    began_to_end, ended = python(code)
    assert ended - float(began_to_end) < seconds
