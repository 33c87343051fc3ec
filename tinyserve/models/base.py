"""What every architecture shares: the face of a model, and how its layers are built from a checkpoint.

Knows no architecture by name; `models/__init__.py` keeps that table.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from tinyserve.config import ModelConfig
from tinyserve.errors import CheckpointError
from tinyserve.models.batch import Batch
from tinyserve.models.cache import KVCache
from tinyserve.models.layers import Embedding, LayerNorm, Linear, RMSNorm
from tinyserve.quantize import Matrix, at_least_8_bits, no_bias, pack, pack_blocks
from tinyserve.shapes import tensor_shapes
from tinyserve.tensor.gguf_blocks import Blocks
from tinyserve.tensor.matmul import PLAIN, SILU_MUL
from tinyserve.tensor.quant import PANEL
from tinyserve.weights.checkpoint import Checkpoint

Array = np.ndarray


class Model(Protocol):
    """Token ids to logits. Holds weights and nothing else: state belongs to sequences, in the cache."""

    config: ModelConfig

    def __call__(self, batch: Batch, cache: KVCache) -> Array:
        """-> hidden states (tokens, hidden) float32, before the last norm."""
        ...

    def logits(self, hidden: Array) -> Array:
        """hidden (rows, hidden) -> (rows, vocab) float32: the last norm, and the head."""
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

    def linear(self, *names: str, transposed: bool = False, activation: int = PLAIN) -> Linear:
        """The layers `names` as one, outputs one after the other; `transposed` where the file has (inputs, outputs)."""
        bias = np.concatenate(biases) if (biases := self._biases(names)) else no_bias()
        bias.flags.writeable = False
        return Linear(self._matrix(names, self.dtype, _one_after_the_other, transposed), bias, activation)

    def gated(self, gate: str, up: str) -> Linear:
        """silu(gate(x)) · up(x) as one product: a panel of gates, the panel that they let through, and so on."""
        bias = no_bias()
        if biases := self._biases((gate, up)):
            bias = _panel_by_panel([b[:, None] for b in biases])[:, 0].copy()
            bias.flags.writeable = False
        width = self._shapes[f"{gate}.weight"][0]
        return Linear(self._matrix((gate, up), self.dtype, _panel_by_panel), bias, SILU_MUL, width)

    def head(self, name: str) -> Linear:
        """A head that is no embedding; like one, it keeps 8 bits."""
        return Linear(self._matrix((name,), at_least_8_bits(self.dtype), _one_after_the_other), no_bias())

    def embedding(self, name: str) -> Embedding:
        """A token embedding, which serves as the head of a model that ties them."""
        return Embedding(self._matrix((name,), at_least_8_bits(self.dtype), _one_after_the_other))

    def _matrix(self, names: Sequence[str], dtype: str, arrange: "_Arrange", transposed: bool = False) -> Matrix:
        """The weights `names`, their rows arranged as one matrix, packed: from the file's own blocks if it has any."""
        tensors = [self.checkpoint.tensors[f"{name}.weight"] for name in names]
        matrix = None
        if not transposed and all(tensor.blocks for tensor in tensors):
            blocks = [tensor.blocks() for tensor in tensors if tensor.blocks]
            if len({one.quantization for one in blocks}) == 1:
                raw = arrange([one.raw for one in blocks])
                whole = Blocks(blocks[0].quantization, raw, (len(raw), blocks[0].shape[1]))
                matrix = pack_blocks(whole, dtype)
        if matrix is not None:
            for name in names:
                self._advance(math.prod(self._shapes[f"{name}.weight"]))
        else:
            # Parts are read one by one and forgotten when they are in their place.
            parts = (self._read(f"{name}.weight") for name in names)
            whole_floats = arrange([part.T for part in parts] if transposed else list(parts))
            try:
                matrix = pack(whole_floats, dtype)
            except OverflowError as error:
                raise CheckpointError(
                    f"{tensors[0].file}: tensor {names[0] + '.weight'!r} cannot be {dtype}: its {error}; use bfloat16."
                ) from None
        self.nbytes += matrix.nbytes
        return matrix

    def _biases(self, names: Iterable[str]) -> list[Array]:
        return [self.array(f"{name}.bias") for name in names if f"{name}.bias" in self._shapes]

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
        self._advance(array.size)
        return array

    def _advance(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total)


_Arrange = Callable[[list[Array]], Array]


def _one_after_the_other(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _panel_by_panel(parts: list[Array]) -> Array:
    """Parts of equal shape (rows, anything): a panel of each in turn, the last ones filled with zeros."""
    rows, rest = parts[0].shape
    panels = -(-rows // PANEL)
    whole = np.zeros((panels, len(parts), PANEL, rest), parts[0].dtype)
    for i, part in enumerate(parts):
        full = rows // PANEL
        whole[:full, i] = part[: full * PANEL].reshape(full, PANEL, rest)
        if full < panels:
            whole[full, i, : rows - full * PANEL] = part[full * PANEL :]
    return whole.reshape(-1, rest)
