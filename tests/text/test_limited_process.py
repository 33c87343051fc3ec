"""A process ends over what it has no room for, and says of what kind that was; the next question finds another one."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tinyserve.text.limited_process import (
    LIMITS_MEMORY,
    CancelledError,
    EndedError,
    Excess,
    LimitedProcesses,
    Limits,
)

pytestmark = pytest.mark.fast
is_posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither this clock nor signals")

ANSWERS = '''
"""Does what it is told, which is a line of Python."""
import os, sys, threading, time
from tinyserve.text.limited_process import limit_processor

def answerer(setup):
    def answer(question):
        given = {**globals(), "setup": setup}
        exec(question.decode(), given)
        return str(given.get("answer", "")).encode()
    return answer
'''
ROOMY = Limits(1 << 30)
DEEP = "def deep(n): return 1 + max(map(deep, [n - 1])) if n else 0\nsys.setrecursionlimit(10**9)\nanswer = deep(%d)"


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., LimitedProcesses]]:
    """Processes of limits that answer as above."""
    (tmp_path / "answers_for_a_test.py").write_text(ANSWERS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(limits: Limits = ROOMY, **options: object) -> LimitedProcesses:
        made.append(LimitedProcesses("answers_for_a_test", "answers", limits, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for processes in made:
        processes.close()


def ask(processes: LimitedProcesses, question: str, max_seconds: float = 60) -> str:
    return processes.ask(question.encode(), max_seconds).decode()


@pytest.mark.parametrize(
    ("question", "max_seconds", "excess"),
    [
        ("time.sleep(99)", 0.2, Excess.WAIT),
        ("while True: pass", 0.2, Excess.WAIT),
        pytest.param("limit_processor(0.1)\nwhile True: pass", 60, Excess.PROCESSOR, marks=is_posix),
        pytest.param("limit_processor(0.1)\n2 ** 10 ** 11", 60, Excess.PROCESSOR, marks=is_posix),
        pytest.param(
            "b'x' * (1 << 31)", 60, Excess.SPACE, marks=pytest.mark.skipif(not LIMITS_MEMORY, reason="limits none")
        ),
        (DEEP % 10**6, 60, Excess.SPACE),
        ("os._exit(0)", 60, Excess.SPACE),
        ("os.kill(os.getpid(), 9)", 60, Excess.SPACE),
    ],
)
def test_what_ends_a_process_is_told_and_the_next_is_another(
    make: Callable[..., LimitedProcesses], question: str, max_seconds: float, excess: Excess
) -> None:
    processes = make(Limits(1 << 30, stack=1 << 20))
    with pytest.raises(EndedError) as error:
        ask(processes, question, max_seconds)
    assert error.value.excess is excess
    assert ask(processes, "answer = 1 + 1") == "2"


def test_the_setup_comes_first_and_any_bytes_go_in_and_out(make: Callable[..., LimitedProcesses]) -> None:
    processes = make(setup=b"\0\n\xff" * 100_000)
    assert ask(processes, "answer = (len(setup), setup[:3])") == "(300000, b'\\x00\\n\\xff')"
    assert ask(processes, "answer = 'x\\n' * 500_000") == "x\n" * 500_000
    assert ask(processes, "") == ""


@pytest.mark.skipif(sys.platform != "linux", reason="each thread has a niceness on Linux alone")
def test_others_come_first_once_a_question_takes_long(make: Callable[..., LimitedProcesses]) -> None:
    """Also before the thread with its own stack that answers; the process answers no other question."""
    nice = "os.getpriority(os.PRIO_PROCESS, threading.get_native_id())"
    processes = make(Limits(1 << 30, stack=1 << 20, haste=0.2, slow=17))
    first, quick = ask(processes, f"import threading\nanswer = (os.getpid(), {nice})").strip("()").split(", ")
    until = f"import threading\nwhile {nice} < 17: pass\nanswer = (os.getpid(), {nice})"
    same, slow = ask(processes, until).strip("()").split(", ")
    assert (quick, slow, same) == (str(os.nice(0)), "17", first)
    other, fresh = ask(processes, f"import threading\nanswer = (os.getpid(), {nice})").strip("()").split(", ")
    assert other != first and fresh == quick


def test_time_that_was_limited_is_not_later(make: Callable[..., LimitedProcesses]) -> None:
    processes = make()
    ask(processes, "limit_processor(0.1)\nlimit_processor(0)")
    assert ask(processes, "start = time.process_time()\nwhile time.process_time() < start + .3: pass") == ""


def test_who_leaves_ends_the_work(make: Callable[..., LimitedProcesses]) -> None:
    processes, start = make(), time.monotonic()
    with pytest.raises(CancelledError):
        processes.ask(b"time.sleep(99)", 99, lambda: time.monotonic() > start + 0.2)
    assert time.monotonic() < start + 60
    assert ask(processes, "answer = 3") == "3"


@is_posix
def test_ctrl_c_is_the_parents(make: Callable[..., LimitedProcesses]) -> None:
    processes = make()
    pid = int(ask(processes, "answer = os.getpid()"))
    os.kill(pid, signal.SIGINT)
    assert ask(processes, "answer = os.getpid()") == str(pid)


def test_so_many_run_and_so_many_are_kept(make: Callable[..., LimitedProcesses], tmp_path: Path) -> None:
    busy = (
        f"open({str(tmp_path)!r} + '/at-' + str(os.getpid()), 'w').close()\n"
        f"answer = len([name for name in os.listdir({str(tmp_path)!r}) if name.startswith('at-')])\n"
        "time.sleep(.1)\n"
        f"os.remove({str(tmp_path)!r} + '/at-' + str(os.getpid()))"
    )
    processes = make(most_running=2, most_idle=1)
    beside: list[int] = []
    threads = [threading.Thread(target=lambda: beside.append(int(ask(processes, busy)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(beside) == 6 and max(beside) <= 2
    assert processes._idle.qsize() == 1
    (process,) = processes._idle.queue
    processes.close()
    assert process.returncode is not None


@is_posix
def test_a_fork_has_processes_of_its_own_and_nothing_stays_behind(
    make: Callable[..., LimitedProcesses], tmp_path: Path
) -> None:
    """A child that wrote into its parent's process would take the answer away from it."""
    code = (
        "import os\n"
        "from tinyserve.text.limited_process import LimitedProcesses, Limits\n"
        "one = LimitedProcesses('answers_for_a_test', 'answers', Limits(1 << 30), most_running=1)\n"
        "pid = lambda: one.ask(b'answer = os.getpid()', 60).decode()\n"
        "mine = pid()\n"
        "child = os.fork()\n"
        "assert (pid() == mine) == bool(child)\n"
        "print(pid(), flush=True)\n"
        "if child: assert os.waitpid(child, 0)[1] == 0\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
    pids = [int(line) for line in done.stdout.split()]
    assert len(set(pids)) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
