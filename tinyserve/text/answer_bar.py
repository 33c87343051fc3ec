"""The bars that are shown over many prompts: of `generate`, how many answers are given and how fast tokens come.

Knows requests and rich; a bar is told of each step, and draws at a pace of its own.
"""

import sys
from time import perf_counter
from typing import TYPE_CHECKING, Self

from tinyserve.text.request import RequestState

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


def is_shown(wanted: bool | None, total: int) -> bool:
    """Whether there is a bar over so many prompts: as is wanted, and by default on a terminal over several."""
    return wanted if wanted is not None else total > 1 and sys.stderr is not None and sys.stderr.isatty()


def make_bar(what: str, *columns: "str | ProgressColumn", shown: bool = True) -> "Progress":
    """A bar on stderr that counts `what`, with further columns, and is gone when it ends."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), *columns, TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, disable=not shown,
    )  # fmt: skip


class AnswerBar:
    """Counts answers; a context manager. By default a bar is shown on a terminal where there are several."""

    def __init__(self, total: int, shown: bool | None = None):
        self.answered = 0
        self._total = total
        self._shown = is_shown(shown, total)
        self._read: dict[RequestState, int] = {}  # prompt tokens of those that are being read
        self._prompt_tokens, self._output_tokens = 0, 0
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        self._started = perf_counter()
        if self._shown:
            self._bar = make_bar("answers", "{task.fields[speed]}")
            self._task = self._bar.add_task("", total=self._total, speed="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, request: RequestState) -> None:
        """A request has taken in an update."""
        self.answered += request.finished
        if self._bar is None:
            return
        # What is computed again after a preemption counts again.
        read = min(request.num_computed, request.metrics.prompt_tokens) or self._read.get(request, 0)
        self._prompt_tokens += max(0, read - self._read.get(request, request.metrics.cached_tokens))
        self._output_tokens += bool(request.token_ids)
        self._read[request] = read
        seconds = max(1e-9, perf_counter() - self._started)
        speed = f"prefill {self._prompt_tokens / seconds:.0f}/s, decode {self._output_tokens / seconds:.0f}/s"
        self._bar.update(self._task, completed=self.answered, speed=speed)
