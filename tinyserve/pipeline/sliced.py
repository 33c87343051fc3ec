"""A model of which this process has the last layers, and slices the others: the face of a whole one to whoever runs it.

Knows what has to go to the slices, in which order; how it gets there is a transport's.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np

from tinyserve.errors import CacheLostError
from tinyserve.models.base import DecoderModel
from tinyserve.models.batch import Batch, Work
from tinyserve.models.cache_plan import CachePlan
from tinyserve.models.dtypes import kept_weights
from tinyserve.models.forward import Begun, ForwardPass, Step
from tinyserve.models.kv_cache import KVCache
from tinyserve.pipeline.micro_batches import PER_SLICE, MicroBatch, micro_batches
from tinyserve.pipeline.partition import Place
from tinyserve.pipeline.slice import Copy, Loaded, Message, Part, Slice
from tinyserve.tensor import _jit
from tinyserve.tensor.cgroups import available_memory

Array = np.ndarray


class Slices(Protocol):
    """The slices of a model but the last, wherever they are: a transport."""

    layers: list[range]  # of each, and at last those of this process
    places: list[Place]  # where they are
    num_bytes: int  # that have gone from one process to another in steps
    are_parallel: bool  # whether they can work at the same time, and this process beside them

    def load(self, plan: CachePlan) -> Callable[[], list[Loaded]]:
        """Begin to load all of them, as `Slice.load`; what is returned waits for the end of it."""

    def send(self, message: Message) -> Callable[[], Array]:
        """Have them go through a message one after the other; what is returned waits for what they make of its tokens.

        It is valid until the next of these is called, in the order of the messages. Both raise CacheLostError where
        one of the slices has died, or does not answer.
        """

    def recover(self) -> None:
        """After that: wait until all have their layers again, with empty caches. Raises EngineDeadError."""

    def close(self) -> None:
        """End them."""


class LocalSlices:
    """Slices in this process."""

    num_bytes = 0
    are_parallel = True  # not truly: what comes of it can be seen here

    def __init__(self, parts: Sequence[Part]):
        """The last part is not theirs."""
        self.layers = [part.layers for part in parts]
        self.places = [Place("this machine", available_memory())] * len(parts)
        self.slices = [Slice(part) for part in parts[:-1]]
        self._plan: CachePlan | None = None

    def load(self, plan: CachePlan) -> Callable[[], list[Loaded]]:
        self._plan = plan
        loaded = [one.load(plan) for one in self.slices]
        return lambda: loaded

    def send(self, message: Message) -> Callable[[], Array]:
        def run() -> Array:
            stream: Array | None = None
            for one in self.slices:
                stream = one.run(message, stream)
            assert stream is not None
            return stream

        return run

    def recover(self) -> None:
        assert self._plan is not None
        self.load(self._plan)

    def close(self) -> None: ...


class SlicedModel:
    """The last layers of a model, with the face of the whole."""

    def __init__(self, last: DecoderModel, others: Sequence[Loaded], dtype: str):
        self.config, self.layers = last.config, last.layers
        self.normed, self.logits = last.normed, last.logits
        self.nbytes = last.nbytes + sum(one.nbytes for one in others)
        by_bits = sum((Counter(one.weights_by_bits) for one in others), Counter(last.weights_by_bits))
        self.kept = kept_weights(dtype, by_bits, self.nbytes)
        self._last = last

    def __call__(self, batch: Batch, cache: KVCache) -> Array:
        return self._last(batch, cache)


class SlicedCache(KVCache):
    """The last layers' part of the cache. Copies are made where all slices make them: before what is computed next."""

    def __init__(self, *sizes: Any):
        super().__init__(*sizes)
        self._copies: list[Copy] = []

    def copy_block(self, source: int, target: int) -> None:
        self._copies.append(Copy("block", source, target))

    def copy_state(self, source: int, target: int) -> None:
        self._copies.append(Copy("state", source, target))

    def take_copies(self) -> list[Copy]:
        """Those that were asked for since the last time."""
        copies, self._copies = self._copies, []
        return copies

    def make(self, copies: Sequence[Copy]) -> None:
        """Make them in this part."""
        for kind, source, target in copies:
            if kind == "block":
                super().copy_block(source, target)
            else:
                super().copy_state(source, target)


class _UnderWay(NamedTuple):
    """A part of a step that the other slices have been sent, with what it begins with here."""

    batch: MicroBatch
    copies: Sequence[Copy]
    answer: Callable[[], Array]


class SlicedForwardPass(ForwardPass):
    """The forward pass of the last slice, which goes on from what the others have made."""

    cache: SlicedCache

    def __init__(self, model: SlicedModel, cache: SlicedCache, slices: Slices, num_threads: int):
        super().__init__(model, cache)
        self.slices, self._threads = slices, num_threads
        self.stream_width = model.config.hidden_size
        self._under_way = deque[_UnderWay]()
        self._owes = False  # what earlier steps have left, and told the engine of: copies, or tokens to be computed

    def begin(self, work: Work, rows: Sequence[int], all_hidden: bool = False) -> Begun:
        """Have the slices go through a step's tokens, and this process too, but for what is left for the end.

        In mid-prompt, where nothing of the tokens is asked for, one part stays with the slices until the next step, so
        that they have always something to do. Raises CacheLostError.
        """
        copies = self.cache.take_copies()
        self._owes = bool(copies or self._under_way)
        with self._failures():
            is_cut = self.slices.are_parallel and not all_hidden
            for batch in micro_batches(work, rows, PER_SLICE * len(self.slices.layers) if is_cut else 1):
                answer = self.slices.send(Message(copies, batch.work))
                self._under_way.append(_UnderWay(batch, copies, answer))
                copies = []
            left = int(is_cut and not rows)
            for _ in range(len(self._under_way) - left - 1):
                begun = self._next()
                with _jit.one_at_a_time(self._threads):
                    super().__call__(begun.work, begun.rows, stream=begun.stream)
            return self._next()

    def __call__(self, work: Work, rows: Sequence[int], all_hidden: bool = False, stream: Array | None = None) -> Step:
        """The same as of a whole model, of what `begin` has left; raises CacheLostError, too."""
        with self._failures():
            return super().__call__(work, rows, all_hidden, stream)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Of a step that fails nothing is kept; the cache is lost where it owes it what earlier steps have left."""
        try:
            yield
        except CacheLostError:
            raise
        except Exception as error:
            self._under_way.clear()
            if not self._owes:
                raise
            raise CacheLostError(f"A step has failed ({type(error).__name__}: {error}), and others with it.") from error

    def _next(self) -> Begun:
        batch, copies, answer = self._under_way.popleft()
        stream = answer()
        self.cache.make(copies)
        return Begun(batch.work, batch.rows, stream)

    def recover(self) -> None:
        self._under_way.clear()
        self.cache.take_copies()
        self.slices.recover()
