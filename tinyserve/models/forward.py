"""The forward pass as programs: a model captured once for each shape of batch, and replayed.

Knows a model's face and its cache; what runs in a batch, and what becomes of logits, is told above.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from tinyserve.models.batch import Batch, BatchShape, Work
from tinyserve.models.config import ModelConfig
from tinyserve.models.kv_cache import KVCache
from tinyserve.tensor.arena import Arena
from tinyserve.tensor.program import Program, capture
from tinyserve.tensor.rows import take_rows
from tinyserve.tensor.sampling import find_largest

Array = np.ndarray

MOST_PROGRAMS = 64  # kept: those that were run last. One is some 100 kB, and a new one some milliseconds of Python


class Model(Protocol):
    """The face of a model: whole, or the last layers of one whose others are in other processes (pipeline/)."""

    config: ModelConfig
    layers: range  # that are in this process
    nbytes: int  # of all weights as they are kept
    kept: str  # what is kept, in words

    def __call__(self, batch: Batch, cache: KVCache, /) -> Array:
        """-> hidden states (tokens, hidden), before the last norm; of the wanted tokens, if others are not."""

    def normed(self, hidden: Array) -> Array:
        """-> (rows, hidden), behind the last norm."""

    def logits(self, hidden: Array) -> Array:
        """-> (rows, vocab)."""


class Step(NamedTuple):
    """A captured forward pass: where its inputs are written, and where its results are until the next one runs."""

    program: Program
    batch: Batch
    hidden: Array  # (tokens, hidden) float32, before the last norm; of `rows` alone where others are not wanted
    logits: Array  # (rows, vocab) float32
    largest: tuple[Array, Array]  # of each row, as `sampling.find_largest` says

    @property
    def token_ids(self) -> Array:
        """The greedy choices (rows,) int64; -1 where logits are no numbers."""
        return self.largest[0]


class Begun(NamedTuple):
    """A step of which nothing is left to wait for: what is to be computed here, as `ForwardPass` is called with it."""

    work: Work
    rows: Sequence[int]
    stream: Array | None = None  # (tokens, hidden) float32, of layers in other processes


class ForwardPass:
    """A model over its cache. Shapes of batches that have not come for long are forgotten."""

    stream_width = 0  # of what layers in other processes have made

    def __init__(self, model: Model, cache: KVCache):
        self.model, self.cache = model, cache
        self._steps: OrderedDict[BatchShape, Step] = OrderedDict()
        self._arena = Arena()

    def __call__(self, work: Work, rows: Sequence[int], all_hidden: bool = False, stream: Array | None = None) -> Step:
        """Compute the new tokens of some sequences, and the logits behind `rows` of them.

        A slice that is not the first goes on from a `stream` (tokens, hidden) float32, what those before it have made.
        """
        for _, cache in work:
            if cache.num_computed == 0:
                self.cache.reset_state(cache.state_slot)  # a new sequence: its state begins with zeros
        step = self.step(BatchShape.of(work, len(rows), all_hidden, 0 if stream is None else stream.shape[1]))
        step.batch.fill(work, rows, self.cache.block_size, stream)
        step.program.run()
        return step

    def record(self, work: Work, num_rows: int) -> None:
        """Record the program of a step, and keep nothing of it."""
        self._captured(BatchShape.of(work, num_rows, False, self.stream_width))

    def begin(self, work: Work, rows: Sequence[int], all_hidden: bool = False) -> Begun:
        """Have layers in other processes, where there are any, compute a step's tokens; kernels are free meanwhile."""
        return Begun(work, rows)

    def recover(self) -> None:
        """After a CacheLostError, have an empty cache again. Where all of it is in this process it is never lost."""

    def step(self, shape: BatchShape) -> Step:
        """The program for a shape of batch."""
        step = self._steps.get(shape)
        if step is None:
            step = self._steps[shape] = self._captured(shape)
            if len(self._steps) > MOST_PROGRAMS:
                self._steps.popitem(last=False)
        else:
            self._steps.move_to_end(shape)
        return step

    def _captured(self, shape: BatchShape) -> Step:
        batch = Batch.empty(shape)
        with capture(self._arena) as program:
            results = compute(self.model, self.cache, batch)
        return Step(program, batch, *results)


def compute(model: Model, cache: KVCache, batch: Batch) -> tuple[Array, Array, tuple[Array, Array]]:
    """The hidden states of a batch, and behind its `rows` logits and the largest of them, as `Step` has them."""
    hidden = model(batch, cache)
    if not batch.rows.size:
        nothing = np.empty((0, 0), np.float32)
        return hidden, np.empty((0, model.config.vocab_size), np.float32), (np.empty(0, np.int64), nothing)
    logits = model.logits(hidden if len(batch.rows) == len(hidden) else take_rows(hidden, batch.rows))
    return hidden, logits, find_largest(logits)
