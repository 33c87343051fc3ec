"""One line on stderr that says what a slow start is doing: loading weights, compiling kernels.

Knows stages and terminals. On a terminal the line is overwritten and removed; elsewhere only what is rare is said.
"""

import sys
from time import perf_counter
from typing import Self


class StartLine:
    """Hears an LLM's progress; use it as a context manager around building one."""

    def __init__(self, model: str):
        self.model = model
        self.started = perf_counter()
        self._terminal = sys.stderr.isatty()
        self._compiled = 0
        self._last_shown = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._write("")
        elif self._compiled:
            print(f"tinyserve: compiled {self._compiled} kernels in {self.seconds:.0f} s", file=sys.stderr)

    @property
    def seconds(self) -> float:
        """Seconds since the line was made."""
        return perf_counter() - self.started

    def __call__(self, stage: str, done: int, total: int) -> None:
        """What an LLM reports: ("load", numbers packed, numbers in all), or ("compile KERNEL", how many, 0)."""
        if stage.startswith("compile"):
            self._compiled = done
            kernel = stage.removeprefix("compile ").strip("_")
            self._say(f"compiling kernels for this processor, once: {done} so far, {kernel} ({self.seconds:.0f} s)")
        elif self._terminal and (perf_counter() - self._last_shown > 0.1 or done == total):
            self._write(f"loading {self.model}: {100 * done // max(1, total)} %")

    def _say(self, line: str) -> None:
        if self._terminal:
            self._write(line)
        elif self._compiled == 1:
            print("tinyserve: compiling kernels for this processor, once (about half a minute)", file=sys.stderr)

    def _write(self, line: str) -> None:
        self._last_shown = perf_counter()
        print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)
