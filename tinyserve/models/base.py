"""What every architecture shares: the face of a model, and how its layers are built from a checkpoint.

Knows no architecture by name; `models/__init__.py` keeps that table.
"""

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from tinyserve.config import ModelConfig
from tinyserve.errors import CheckpointError
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
        shapes = {tensor.name: tensor.shape for tensor in tensor_shapes(config)}
        for name, shape in shapes.items():
            checkpoint.check(name, shape)
            self._total += math.prod(shape)
        self._shapes = shapes

    def array(self, name: str) -> Array:
        """A tensor as float32, for norms, biases and positions."""
        array = np.ascontiguousarray(self._read(name))
        self.nbytes += array.nbytes
        array.flags.writeable = False
        return array

    def linear(self, *names: str, transposed: bool = False) -> Linear:
        """The layers `names` as one, outputs one after the other; `transposed` where the file has (inputs, outputs)."""
        weights = [f"{name}.weight" for name in names]
        biases = [f"{name}.bias" for name in names if f"{name}.bias" in self._shapes]
        bias = np.concatenate([self.array(name) for name in biases]) if biases else no_bias()
        bias.flags.writeable = False
        if len(weights) == 1:
            weight = self._read(weights[0])
            return Linear(self._pack(weight.T if transposed else weight), bias)
        # Each part is forgotten before the next one is read: the peak is the whole and one part.
        outputs, inputs = (1, 0) if transposed else (0, 1)
        rows = [self._shapes[name][outputs] for name in weights]
        whole, first = np.empty((sum(rows), self._shapes[weights[0]][inputs]), np.float32), 0
        for name, count in zip(weights, rows, strict=True):
            part = self._read(name)
            whole[first : first + count] = part.T if transposed else part
            first += count
        return Linear(self._pack(whole), bias)

    def embedding(self, name: str) -> Embedding:
        """A token embedding, which serves as the head of a model that ties them."""
        return Embedding(self._pack(self._read(f"{name}.weight")), no_bias())

    def rms_norm(self, name: str, eps: float) -> RMSNorm:
        return RMSNorm(self.array(f"{name}.weight"), eps)

    def layer_norm(self, name: str, eps: float) -> LayerNorm:
        return LayerNorm(self.array(f"{name}.weight"), self.array(f"{name}.bias"), eps)

    def _read(self, name: str) -> Array:
        array = self.checkpoint[name]
        # A sum is not a number if anything in it is not, and costs a tenth of looking at each.
        if not np.isfinite(array.sum()) and not (finite := np.isfinite(array)).all():
            where = [int(i) for i in np.argwhere(~finite)[0]]
            raise CheckpointError(
                f"{self.checkpoint.tensors[name].file}: tensor {name!r} holds {array[tuple(where)]} at {where}: the "
                f"weights are damaged, download them again."
            )
        self._done += array.size
        self._progress(self._done, self._total)
        return array

    def _pack(self, weight: Array) -> Matrix:
        matrix = pack(weight, self.dtype)
        self.nbytes += matrix.nbytes
        return matrix
