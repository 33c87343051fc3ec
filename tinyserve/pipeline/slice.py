"""A slice of a model: some of its layers, and their part of the cache. What is done to it comes in messages.

Knows no other slice, and not in which process it is: sliced.py calls it directly, on_ray.py as an actor.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tinyserve.checkpoints.checkpoint import Checkpoint
from tinyserve.errors import UserError
from tinyserve.models import build_model
from tinyserve.models.base import DecoderModel
from tinyserve.models.cache_plan import CachePlan
from tinyserve.models.config import ModelConfig
from tinyserve.models.forward import ForwardPass
from tinyserve.models.kv_cache import KVCache
from tinyserve.pipeline.micro_batches import SequencePlace
from tinyserve.tensor import _jit

Array = np.ndarray


class Copy(NamedTuple):
    """A copy within the cache, of a "block" or a "state"."""

    kind: str
    source: int
    target: int


class Message(NamedTuple):
    """What is copied in the cache, in this order, and then the new tokens of some sequences."""

    copies: Sequence[Copy]
    work: Sequence[tuple[Sequence[int], SequencePlace]]


class Part(NamedTuple):
    """What a slice loads: some layers of a model, in a dtype. `open` finds the model wherever the slice is."""

    open: Callable[[], tuple[ModelConfig, Checkpoint]]
    config: ModelConfig  # which `open` must find, too
    dtype: str
    layers: range
    num_threads: int | None  # None: all cores of its process


class Loaded(NamedTuple):
    """What a slice has in memory."""

    nbytes: int  # of its weights
    weights_by_bits: Mapping[int, int]


class Slice:
    """Some layers of a model, which go on with what the layers before them have made of a step's tokens."""

    def __init__(self, part: Part):
        self.part = part
        self._model: DecoderModel | None = None
        self._forward: ForwardPass | None = None
        self._threads = 1

    def load(self, plan: CachePlan) -> Loaded:
        """Read the weights, unless they are there, take memory for an empty cache, and have kernels compiled.

        Raises UserError where `plan` or the model's files do not fit, and what opening them raises.
        """
        part = self.part
        self._threads = _jit.set_threads(None if part.num_threads is None else min(part.num_threads, _jit.cores()))
        with _jit.one_at_a_time(self._threads):
            self._forward = None  # its cache is freed before there is another
            model = self._model
            if model is None:
                config, checkpoint = part.open()
                if config != part.config:
                    raise UserError(
                        f"{checkpoint.source} is not the model that the other slices have, as its config says: put "
                        "the same files on all machines."
                    )
                model = build_model(config, checkpoint, part.dtype, plan.max_model_len, layers=part.layers)
                self._model = model
            forward = ForwardPass(model, KVCache(part.config, *plan.sizes, part.layers))
            told = hashlib.sha256(f"{part.config!r} {part.dtype} {part.layers} {plan.kv_cache_dtype}".encode())
            place = SequencePlace([0], plan.scratch_slot, 0)
            width = part.config.hidden_size

            def run_kernels() -> None:
                for tokens in (3, 1):  # a single row has kernels of its own
                    stream = np.zeros((tokens, width), np.float32) if part.layers.start else None
                    forward([([0] * tokens, place)], [], True, stream)

            _jit.compile_once(f"slice-{told.hexdigest()[:16]}", run_kernels, lambda: None)
            self._forward = forward
        return Loaded(model.nbytes, model.weights_by_bits)

    def run(self, message: Message, stream: Array | None = None) -> Array:
        """What its layers make of a step's tokens, (tokens, hidden) float32; `stream` is that of the slice before it.

        The result is valid until the next call.
        """
        forward = self._forward
        if forward is None:
            raise RuntimeError("nothing is loaded")
        with _jit.one_at_a_time(self._threads):
            for kind, source, target in message.copies:
                if kind == "block":
                    forward.cache.copy_block(source, target)
                else:
                    forward.cache.copy_state(source, target)
            return forward(message.work, [], True, stream).hidden
