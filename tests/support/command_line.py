"""The command line as a user has it: in this process, as a process of its own, or in a terminal of its own.

Knows exit codes and streams; what the commands are for is in the tests.
"""

import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tinyserve import cli
from tinyserve.server import heaps

PROGRAM = [sys.executable, "-m", "tinyserve"]


COMPILING = ("tinyserve: compil", "tinyserve: another process is compiling")


@dataclass(frozen=True)
class Result:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """What an error says: one line, after the program's name. Checks that there is nothing else.

        Whichever test is the first to need a kernel hears that it is compiled.
        """
        assert self.out == ""
        assert self.code in (1, 2)
        lines = [line for line in self.err.splitlines() if not line.startswith(COMPILING)]
        assert len(lines) == 1 and lines[0].startswith("tinyserve: ") and lines[0].endswith((".", "?")), self.err
        assert "internal error" not in lines[0]
        return lines[0].removeprefix("tinyserve: ")


class Shell:
    """Runs commands in this process, with stdin from a string; no terminal, no network."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def __call__(self, *arguments: str | Path, stdin: str | bytes = "") -> Result:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        self._monkeypatch.setattr(sys, "argv", ["tinyserve", *map(str, arguments)])
        self._monkeypatch.setattr(heaps, "keep_heaps_small", lambda: None)  # of this process, which has other tests
        self._capsys.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            return Result(int(end.code or 0), *self._capsys.readouterr())
        raise AssertionError("main came back")


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without its Hub settings, plus `variables`."""
    hidden = ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "COLUMNS")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {"NO_PROXY": "127.0.0.1", "PYTHONUNBUFFERED": ""} | variables


def run(*arguments: str | Path, stdin: str = "", **variables: str) -> Result:
    """Run a command as a process of its own."""
    done = subprocess.run(
        [*PROGRAM, *map(str, arguments)],
        input=stdin.encode(), capture_output=True, env=environment(**variables), timeout=300, check=False,
    )  # fmt: skip
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def hear_signals() -> None:
    """For `preexec_fn`: what a shell starts in the background ignores Ctrl-C, and its children would, too."""
    if sys.platform != "win32":
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)


class Children:
    """Starts programs with pipes of bytes and default signals; those that are left when the block ends are killed."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()

    def __call__(
        self, *arguments: str | Path, program: Sequence[str] = tuple(PROGRAM), **variables: str
    ) -> "subprocess.Popen[bytes]":
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        process = subprocess.Popen(
            [*program, *map(str, arguments)],
            env=environment(**variables), bufsize=0,
            preexec_fn=hear_signals if sys.platform != "win32" else None, **pipes,
        )  # fmt: skip
        self._processes.append(process)
        return process


class Terminal:
    """A command in a terminal: what is typed goes in, `shown` is all that a user has seen, without escape codes.

    On Windows a test that asks for one is skipped: Python has none to give there.
    """

    def __init__(
        self, *arguments: str | Path, columns: int = 80, program: Sequence[str] = tuple(PROGRAM), **variables: str
    ):
        self._master, slave = pytest.importorskip("pty", reason="no terminal to be had").openpty()
        self.shown = ""
        settings: dict[str, Any] = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(
            [*program, *map(str, arguments)],
            env=environment(COLUMNS=str(columns), TERM="xterm", **variables),
            start_new_session=True,
            preexec_fn=_own_the_terminal,  # so that Ctrl-C reaches it
            **settings,
        )
        os.close(slave)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        """Type a text; "\\x03" is Ctrl-C, "\\x04" is Ctrl-D."""
        os.write(self._master, text.encode())

    def wait_for(self, text: str, timeout: float = 120) -> str:
        """Read until `text` was shown after what earlier calls have waited for; returns what came up to it."""
        deadline = time.monotonic() + timeout
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} never came after:\n{self.shown}"
            assert self._read(), f"the program ended before {text!r}:\n{self.shown}"
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def wait_for_more(self, timeout: float = 120) -> None:
        """Read until something was shown after what earlier calls have waited for."""
        deadline = time.monotonic() + timeout
        while not self.shown:
            assert time.monotonic() < deadline, "nothing more was shown"
            assert self._read(), "the program ended and showed nothing more"

    def wait_until_it_sleeps(self) -> None:
        """Python asks for signals before it reads: a Ctrl-C between prompt and read is seen after the next key only."""
        if sys.platform != "linux":
            time.sleep(1)
            return
        asleep, deadline = 0, time.monotonic() + 60
        while asleep < 3:
            assert time.monotonic() < deadline, "the program never waits for a key"
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            asleep = asleep + 1 if state == "S" else 0
            time.sleep(0.02)

    def end(self, timeout: float = 60) -> int:
        """Read to the end; the exit code, as a shell tells it.

        Where Ctrl-C falls into an `exec` of Python's, such as a dataclass in a module that is imported late, CPython
        ends the process by the signal after all, although the program has caught it and asked for 130.
        """
        while self._read():
            pass
        code = self.process.wait(timeout)
        return 128 - code if code < 0 else code

    def _read(self) -> bool:
        if not select.select([self._master], [], [], 120)[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux's end of file in a terminal
            return False
        text = data.decode(errors="replace").replace("\r\n", "\n")
        # A cursor that goes right passes over what is blank, and back first where a row could be full.
        text = re.sub(r"(\x08*)\x1b\[(\d*)C", lambda move: " " * (int(move[2] or 1) - len(move[1])), text)
        self.shown += re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", text)
        return bool(data)


def last_line(shown: str) -> str:
    """What stands in a terminal's last line that was begun: a carriage return lets what follows overwrite it."""
    row: list[str] = []
    column = 0
    for piece in re.split(r"(\r)", shown.rstrip("\n").rpartition("\n")[2]):
        if piece == "\r":
            column = 0
        else:
            row[column : column + len(piece)] = piece
            column += len(piece)
    return "".join(row).rstrip()


def _own_the_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    hear_signals()
