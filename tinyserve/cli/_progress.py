"""One line on stderr that says what a slow start is doing: loading, compiling kernels, reading a long prompt.

Knows stages and terminals. On a terminal the line is overwritten and removed; elsewhere only what is rare is said.
"""

import sys
from time import perf_counter
from typing import Self


class StartLine:
    """Hears an LLM's progress; a context manager around building one, which goes on hearing of long prompts."""

    def __init__(self, model: str):
        self.model = model
        self._started = perf_counter()
        self._ended: float | None = None
        self._terminal = sys.stderr.isatty()
        self._compiled = 0
        self._last_shown = 0.0
        self._shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = perf_counter()
        self.clear()
        if not self._terminal and self._compiled:
            print(f"tinyserve: compiled {self._compiled} kernels in {self.seconds:.0f} s", file=sys.stderr)

    @property
    def seconds(self) -> float:
        """Seconds from when the line was made to the end of its block, or to now."""
        return (self._ended or perf_counter()) - self._started

    def __call__(self, stage: str, done: int, total: int) -> None:
        """What an LLM reports: see its `progress`."""
        share = f"{100 * done // max(1, total)} %"
        if stage.startswith("compile"):
            self._compiled = done
            kernel = stage.removeprefix("compile ").strip("_")
            self._say(f"compiling kernels for this processor: {done} so far, {kernel} ({self.seconds:.0f} s)")
        elif stage == "wait":
            self._say("another process is compiling the kernels: waiting for it")
        elif self._terminal and (perf_counter() - self._last_shown > 0.1 or done == total):
            self._write(f"loading {self.model}: {share}" if stage == "load" else f"reading the prompt: {share}")

    def clear(self) -> None:
        """Remove the line from the terminal."""
        if self._shown:
            self._write("")

    def _say(self, line: str) -> None:
        if self._terminal:
            self._write(line)
        elif self._compiled <= 1:
            about = " (the first time, about half a minute)" if self._compiled else ""
            print(f"tinyserve: {line.split(':')[0]}{about}", file=sys.stderr)

    def _write(self, line: str) -> None:
        self._last_shown, self._shown = perf_counter(), line
        print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
