"""What every architecture shares: the face of a model, and how its layers are built from a checkpoint.

Knows no architecture by name; `models/__init__.py` keeps that table.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from tinyserve.config import ModelConfig
from tinyserve.models.batch import Batch
from tinyserve.models.cache import KVCache
from tinyserve.models.layers import Embedding, LayerNorm, Linear, RMSNorm
from tinyserve.quantize import Matrix, no_bias, pack
from tinyserve.shapes import tensor_shapes
from tinyserve.weights.checkpoint import Checkpoint

Array = np.ndarray


class Model(Protocol):
    """Token ids to logits. Holds weights and nothing else: state belongs to sequences, in the cache."""

    config: ModelConfig

    def __call__(self, batch: Batch, cache: KVCache) -> Array:
        """-> hidden states (tokens, hidden) float32, after the last norm."""
        ...

    def logits(self, hidden: Array) -> Array:
        """hidden (rows, hidden) -> (rows, vocab) float32."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they are kept."""
        ...


class Loader:
    """Builds layers from a checkpoint, tensor by tensor, and counts what they take."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        dtype: str,
        max_model_len: int,
        progress: Callable[[int, int], None] | None = None,
    ):
        """Check every tensor's presence and shape before anything is allocated; raises CheckpointError."""
        self.checkpoint, self.dtype, self.max_model_len = checkpoint, dtype, max_model_len
        self.nbytes = 0
        self._progress = progress or (lambda done, total: None)
        self._done, self._total = 0, 0
        for tensor in tensor_shapes(config):
            checkpoint.check(tensor.name, tensor.shape)
            self._total += tensor.size

    def array(self, name: str) -> Array:
        """A tensor as float32, for norms, biases and positions."""
        array = np.ascontiguousarray(self.checkpoint[name])
        self._count(array.size)
        self.nbytes += array.nbytes
        array.flags.writeable = False
        return array

    def linear(self, *names: str, transposed: bool = False) -> Linear:
        """The layers `names` as one, outputs one after the other; `transposed` where the file has (inputs, outputs)."""
        parts = [self.checkpoint[f"{name}.weight"] for name in names]
        if transposed:
            parts = [part.T for part in parts]
        weight = np.concatenate(parts) if len(parts) > 1 else parts[0]
        biases = [self.array(f"{name}.bias") for name in names if f"{name}.bias" in self.checkpoint]
        bias = np.concatenate(biases) if biases else no_bias()
        bias.flags.writeable = False
        return Linear(self._pack(weight), bias)

    def embedding(self, name: str) -> Embedding:
        """A token embedding, which serves as the head of a model that ties them."""
        return Embedding(self._pack(self.checkpoint[f"{name}.weight"]), no_bias())

    def rms_norm(self, name: str, eps: float) -> RMSNorm:
        return RMSNorm(self.array(f"{name}.weight"), eps)

    def layer_norm(self, name: str, eps: float) -> LayerNorm:
        return LayerNorm(self.array(f"{name}.weight"), self.array(f"{name}.bias"), eps)

    def _pack(self, weight: Array) -> Matrix:
        matrix = pack(weight, self.dtype)
        self._count(weight.size)
        self.nbytes += matrix.nbytes
        return matrix

    def _count(self, numbers: int) -> None:
        self._done += numbers
        self._progress(self._done, self._total)
