"""Texts that are only read: all positions of one, a chunk of it between two steps of the engine.

Knows blocks and chunks; what is made of the hidden states is told by whoever asks.
"""

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from tinyserve.engine import Engine
from tinyserve.engine_thread import EngineThread
from tinyserve.errors import RequestError, TinyserveError

if TYPE_CHECKING:
    import numpy as np

    from tinyserve.model_runner import ModelRunner, Scratch

T = TypeVar("T")


class TextReader:
    """Reads for any thread, one text at a time, in blocks that no sequence holds; a request waits for a chunk at most.

    Where blocks are missing, the sequence that came last gives up its own and is computed again later.
    """

    def __init__(self, thread: EngineThread, engine: Engine, runner: "ModelRunner"):
        self._thread, self._engine, self._runner = thread, engine, runner
        self._lock = Lock()  # the runner has room for the state of one text

    def read(
        self,
        token_ids: list[int],
        of: "Callable[[np.ndarray], T]",
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> list[T]:
        """What `of` makes of the hidden states (tokens, hidden) of each chunk, in the engine's thread.

        Raises RequestError for a text that does not fit, EngineDeadError, and TinyserveError when it is cancelled.
        """
        self.checked(token_ids)
        parts = []
        with self._lock:
            text = self._thread.call(partial(self._begin, token_ids))
            try:
                while text.num_computed < len(token_ids):
                    if is_cancelled():
                        raise TinyserveError("The text is not wanted any more.")
                    parts.append(
                        self._thread.call(partial(self._runner.read, text, self._engine.max_num_batched_tokens, of))
                    )
            finally:
                self._thread.call(partial(self._engine.blocks.free, text.block_table))
        return parts

    def checked(self, token_ids: list[int]) -> list[int]:
        """A text that can be read; raises RequestError for one that is empty, or too long."""
        if not token_ids or len(token_ids) > self._engine.max_model_len:
            limit = self._engine.max_model_len
            raise RequestError(f"A text to be read has 1 to {limit} tokens, not {len(token_ids)}.", param="prompt")
        return token_ids

    def _begin(self, token_ids: list[int]) -> "Scratch":
        blocks, running = self._engine.blocks, self._engine.running
        needed = blocks.blocks_for(len(token_ids))
        while needed > blocks.num_free and running:
            self._engine.preempt(running[-1])
        if needed > blocks.num_free:
            raise RequestError(
                f"A text of {len(token_ids)} tokens needs {needed} blocks of the cache, and {blocks.num_free} are "
                "free.",
                param="prompt",
            )
        return self._runner.scratch(token_ids, blocks.allocate(needed))
