"""What stderr shows of slow work: a line for loading, compiling and long prompts, a bar for reading a whole text.

Knows stages and terminals. On a terminal both are overwritten and removed; elsewhere only what is rare is said.
"""

import sys
from datetime import timedelta
from time import perf_counter
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress


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
        self._stage = ""  # the first news of a stage is shown, and then ten a second
        self._doing = "reading the prompt"

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
        elif self._terminal and (stage != self._stage or perf_counter() - self._last_shown > 0.1 or done == total):
            self._stage = stage
            self._write(f"loading {self.model}: {share}" if stage == "load" else f"{self._doing}: {share}")

    def show(self, doing: str) -> None:
        """On a terminal, say what is done now; of long prompts it is told from now on how far they are read."""
        self._doing = doing
        self.wait(doing)

    def wait(self, what: str) -> None:
        """On a terminal, say what is waited for, until there is something else to say."""
        self._stage = ""
        if self._terminal:
            self._write(what)

    def clear(self) -> None:
        """Remove the line from the terminal."""
        if self._shown:
            self._write("")

    def _say(self, line: str) -> None:
        if self._terminal:
            self._write(line)
        elif self._compiled <= 1:
            about = " (the first time, up to a minute)" if self._compiled else ""
            print(f"tinyserve: {line.split(':')[0]}{about}", file=sys.stderr)

    def _write(self, line: str) -> None:
        self._last_shown, self._shown = perf_counter(), line
        print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)


class TokenBar:
    """A bar over the tokens of a text for each stage, with the time that is left; nothing where there is no terminal.

    A context manager around the work, so that the terminal is as before when that is interrupted.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` tokens are read; the bar goes when all are."""
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            self._begin(stage, total)
        assert self._bar is not None
        if done:
            # rich's own column needs two steps for its guess, and a step may take minutes.
            seconds = (perf_counter() - self._started) / done * (total - done)
            self._bar.update(self._task, completed=done, left=f"{timedelta(seconds=round(seconds))} left")
        if done == total:
            self.clear()

    def clear(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _begin(self, stage: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(stage, total=total, left="tokens")
        self._started = perf_counter()
        self._bar.start()
