"""Processes of limited time, memory and stack that answer questions: what ends one of them would otherwise end ours.

Knows pipes, limits and how a process ended, nothing of what is asked: a question is bytes, and so is its answer.
"""

from __future__ import annotations

import atexit
import importlib
import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from enum import Enum, auto
from functools import cache
from pathlib import Path
from time import monotonic
from typing import IO, NamedTuple
from weakref import WeakSet

from tinyserve.errors import TinyserveError

logger = logging.getLogger("tinyserve")

POLL = 0.05  # seconds between two looks whether anybody still waits
LIMITS_MEMORY = sys.platform not in ("win32", "darwin")  # macOS has such a limit, and keeps to none

# Modules come from where they come from here, and not from whatever folder this is.
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from tinyserve.text import limited_process
limited_process.main(*sys.argv[2:])
"""


class Limits(NamedTuple):
    """What a process may have: bytes of addresses, its code among them, and of stack; and when others come first.

    A question that takes longer than `haste` seconds of the processor (where the system does not tell, of the clock)
    goes on at the niceness `slow`. A process that has become slow stays so, and answers no other one.
    """

    memory: int
    stack: int | None = None  # the system's
    haste: float = math.inf
    slow: int = 0


class Excess(Enum):
    """What a question took too much of."""

    WAIT = auto()  # seconds of the clock
    PROCESSOR = auto()  # the seconds that `limit_processor` was told
    SPACE = auto()  # memory or stack, as far as the system tells


class EndedError(Exception):
    """A process has ended over a question."""

    def __init__(self, excess: Excess) -> None:
        super().__init__(excess)
        self.excess = excess


class CancelledError(Exception):
    """Nobody waits for the answer any more."""


class LimitedProcesses:
    """Processes that answer alike, several at a time if need be; those that are idle are kept for the next question."""

    def __init__(
        self,
        module: str,
        task: str,
        limits: Limits,
        *,
        setup: bytes = b"",
        most_running: int | None = None,
        most_idle: int = 1,
    ) -> None:
        """`module` is imported in each process, and its `answerer(setup)` gives the function from question to answer.

        task: what the processes do, as it stands behind "The process that" in an error.
        most_running: who asks while so many are at work waits for one of them; None for as many as are asked.
        """
        room = json.dumps([limits.memory, limits.stack])
        self._command = [sys.executable, "-P", "-c", _PROGRAM, json.dumps(sys.path), module, room]
        self._limits = limits
        self._task, self._setup, self._most_running, self._most_idle = task, setup, most_running, most_idle
        self._begin()
        _all.add(self)

    def ask(self, question: bytes, max_seconds: float, is_cancelled: Callable[[], bool] = lambda: False) -> bytes:
        """The answer; `max_seconds` is of the clock, once a process is there.

        Raises EndedError where the question takes too much, CancelledError soon after `is_cancelled`, and
        TinyserveError where no process can be started.
        """
        with self._free:
            process = self._take()
            try:
                answer, is_slow = _exchange(process, question, max_seconds, is_cancelled, self._limits)
            except BaseException:  # an interruption, say: what it would answer now nobody waits for
                _end(process)
                raise
            if is_slow or not self._keep(process):
                _end(process)
            return answer

    def _keep(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether there is room for one more that waits."""
        with suppress(queue.Full):
            self._idle.put_nowait(process)
            return True
        return False

    def close(self) -> None:
        """End the processes that wait."""
        with suppress(queue.Empty):
            while True:
                _end(self._idle.get_nowait())

    def __del__(self) -> None:
        self.close()

    def _begin(self) -> None:
        """Without processes; also in the child of a fork, as they are its parent's."""
        self._free = nullcontext() if self._most_running is None else threading.BoundedSemaphore(self._most_running)
        self._idle: queue.LifoQueue[subprocess.Popen[bytes]] = queue.LifoQueue(self._most_idle)

    def _take(self) -> subprocess.Popen[bytes]:
        with suppress(queue.Empty):
            while True:
                process = self._idle.get_nowait()
                if process.poll() is None:
                    return process
                _end(process)
        if not LIMITS_MEMORY:
            _tell_of_memory(self._task)
        try:
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise TinyserveError(f"The process that {self._task} cannot be started ({error.strerror}).") from None
        assert process.stdin is not None
        with suppress(OSError):  # it has ended: asking it tells
            _write(process.stdin, self._setup)
        return process


@cache
def _tell_of_memory(task: str) -> None:
    logger.info("This system limits no memory: the process that %s may take all of it until its time is over.", task)


_all: WeakSet[LimitedProcesses] = WeakSet()


def _close_all() -> None:
    for processes in list(_all):
        processes.close()


def _forget_all() -> None:
    for processes in list(_all):
        processes._begin()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def _exchange(
    process: subprocess.Popen[bytes],
    question: bytes,
    max_seconds: float,
    is_cancelled: Callable[[], bool],
    limits: Limits,
) -> tuple[bytes, bool]:
    """Ask and hear the answer, and whether it was made slow, while a thread looks at the clock and at whoever waits."""
    assert process.stdin is not None and process.stdout is not None
    answered, start = threading.Event(), monotonic()
    end, is_slow, taken = start + max_seconds, False, _processor_seconds(process.pid)
    reasons: list[Exception] = []

    def watch() -> None:
        nonlocal is_slow
        while not reasons and not answered.wait(POLL):
            if not is_slow and _processor_seconds(process.pid) > taken + limits.haste:
                is_slow = True
                _slow_down(process.pid, limits.slow)
            if is_cancelled():
                reasons.append(CancelledError())
            elif monotonic() > end:
                reasons.append(EndedError(Excess.WAIT))
        if reasons:
            process.kill()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    answer = None
    try:
        with suppress(OSError, EOFError):
            _write(process.stdin, question)
            answer = _read(process.stdout)
    finally:
        answered.set()
    watcher.join()  # or it might yet end a process that is kept
    if reasons:
        raise reasons[0]
    if answer is None:
        is_time = process.wait() == -getattr(signal, "SIGPROF", 0) != 0
        raise EndedError(Excess.PROCESSOR if is_time else Excess.SPACE)
    return answer, is_slow


def _processor_seconds(pid: int) -> float:
    """What a process has taken of the processor, or the clock where the system does not tell."""
    if sys.platform == "linux":
        with suppress(OSError, IndexError, ValueError):
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return monotonic()


def _slow_down(pid: int, niceness: int) -> None:
    """Let others come before a process: on Linux, before each of its threads; on Windows it stays as it is."""
    if sys.platform == "win32":
        return
    threads = Path(f"/proc/{pid}/task")
    with suppress(OSError):
        for thread in [int(one.name) for one in threads.iterdir()] if threads.is_dir() else [pid]:
            os.setpriority(os.PRIO_PROCESS, thread, niceness)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # does nothing where it has ended
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(len(data).to_bytes(8, "little"))
    pipe.write(data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes:
    head = pipe.read(8)
    size = int.from_bytes(head, "little")
    data = pipe.read(size)
    if len(head) < 8 or len(data) < size:
        raise EOFError
    return data


# --- in the process ---------------------------------------------------------------------------------------------------


def main(module: str, room: str) -> None:
    """Answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; it is the parent's to answer
    memory, stack = json.loads(room)
    if sys.platform != "win32":
        import resource

        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError, ValueError):  # macOS refuses it
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if stack is None:
        _serve(module)
    else:
        threading.stack_size(stack)
        thread = threading.Thread(target=_serve, args=(module,))
        thread.start()
        thread.join()


def limit_processor(seconds: float) -> None:
    """End this process after so many seconds of the processor, wherever it is then; 0 lets it live.

    Windows has no such clock: there the seconds that its parent waits are all there is.
    """
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _serve(module: str) -> None:
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    with suppress(EOFError):
        answer: Callable[[bytes], bytes] = importlib.import_module(module).answerer(_read(questions))
        while True:
            _write(answers, answer(_read(questions)))
