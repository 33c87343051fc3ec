"""What is shown over many prompts of `generate`: how many answers are given, and how fast tokens come.

Knows requests; the bar is drawn by progress.py.
"""

from time import perf_counter
from typing import Self

from tinyserve.progress import ProgressBar, is_shown
from tinyserve.text.request import RequestState


class AnswerBar:
    """Counts answers; a context manager. By default a bar is shown on a terminal where there are several."""

    def __init__(self, total: int, shown: bool | None = None):
        self.answered = 0
        self._total = total
        self._bar = ProgressBar(is_shown(shown, total))
        self._read: dict[RequestState, int] = {}  # prompt tokens of those that are being read
        self._prompt_tokens, self._output_tokens = 0, 0

    def __enter__(self) -> Self:
        self._started = perf_counter()
        self._bar("answers", 0, self._total)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.clear()

    def update(self, request: RequestState) -> None:
        """A request has taken in an update."""
        self.answered += request.finished
        if not self._bar.is_shown:
            return
        # What is computed again after a preemption counts again.
        read = min(request.num_computed, request.metrics.prompt_tokens) or self._read.get(request, 0)
        self._prompt_tokens += max(0, read - self._read.get(request, request.metrics.cached_tokens))
        self._output_tokens += bool(request.token_ids)
        self._read[request] = read
        seconds = max(1e-9, perf_counter() - self._started)
        speed = f"prefill {self._prompt_tokens / seconds:.0f}/s, decode {self._output_tokens / seconds:.0f}/s"
        self._bar("answers", self.answered, self._total, f"{self.answered}/{self._total}, {speed}")
