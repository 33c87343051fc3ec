"""Pooling: texts that are only read, a chunk at a time between two steps of the engine, and embeddings of them.

Knows chunks and hidden states; which blocks a text gets is the scheduler's business. An embedding is the mean of a
language model's last hidden states; that of a model that was trained for search says more of what a text is about.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from tinyserve.engine import EngineThread
from tinyserve.errors import RequestError, TinyserveError
from tinyserve.scheduling.scheduler import Scheduler
from tinyserve.text.short_repr import ShortRepr

if TYPE_CHECKING:
    import numpy as np

    from tinyserve.model_runner import ModelRunner

T = TypeVar("T")


@dataclass(eq=False, repr=False)
class EmbeddingOutput(ShortRepr):
    """A text and its vector (hidden,) float32."""

    prompt: str | None
    prompt_token_ids: list[int]
    embedding: "np.ndarray"


class PoolingRunner:
    """Reads texts for any thread, one at a time, in blocks that no sequence holds; a request waits for a chunk at most.

    Where blocks are missing the scheduler preempts sequences, which are computed again later.
    """

    def __init__(self, thread: EngineThread, scheduler: Scheduler, runner: "ModelRunner"):
        self._thread, self._scheduler, self._runner = thread, scheduler, runner
        self._lock = Lock()  # the runner has a state slot for one text

    def run(
        self,
        token_ids: list[int],
        reduce: "Callable[[np.ndarray, int], T]",
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> list[T]:
        """What `reduce` makes of the hidden states (tokens, hidden) of each chunk, and of its place in the text.

        It is called in the engine's thread, and for a chunk more than once where the engine had to begin again.

        Raises RequestError for a text that does not fit, EngineDeadError, and TinyserveError when it is cancelled.
        """
        self.checked(token_ids)
        scheduler, call, parts = self._scheduler, self._thread.call, dict[int, T]()
        with self._lock:
            text = call(partial(scheduler.start_prefill_only, token_ids, self._runner.scratch_slot))
            try:
                while text.cache.num_computed < len(token_ids):
                    if is_cancelled():
                        raise TinyserveError("The text is not wanted any more.")
                    start, part = call(partial(self._runner.prefill, text, scheduler.max_num_batched_tokens, reduce))
                    parts[start] = part
            finally:
                call(partial(scheduler.finish_prefill_only, text))
        return [parts[start] for start in sorted(parts)]

    def checked(self, token_ids: list[int]) -> list[int]:
        """A text that can be read; raises RequestError for one that is empty, or too long."""
        limit = self._scheduler.max_model_len
        if not token_ids or len(token_ids) > limit:
            raise RequestError(f"A text to be read has 1 to {limit} tokens, not {len(token_ids)}.", param="prompt")
        return token_ids


def sum_pool(hidden: "np.ndarray") -> "np.ndarray":
    """hidden (tokens, hidden) -> (hidden,) float64, so that it does not matter where a text was cut into chunks."""
    import numpy as np

    return np.asarray(hidden.sum(axis=0, dtype=np.float64))


def mean_pool(sums: Sequence["np.ndarray"], tokens: int, normalize: bool) -> "np.ndarray":
    """The mean over all tokens (hidden,) float32 from the sums of chunks; with `normalize`, of length 1.

    Raises TinyserveError where it is no number.
    """
    import numpy as np

    mean = np.sum(sums, axis=0) / tokens
    length = np.linalg.norm(mean)
    if not np.isfinite(length):
        raise TinyserveError("The model computed hidden states that are not numbers: its weights are damaged.")
    return np.asarray(mean / length if normalize and length > 0 else mean, np.float32)
