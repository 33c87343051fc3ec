"""How weights are kept: the policy that turns one float32 matrix into what a kernel multiplies with.

Knows dtypes and their kernels; it does not know which layer a matrix belongs to.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np

from tinyserve.models.dtypes import WEIGHT_DTYPES
from tinyserve.tensor import gguf_blocks, grouped_matmul, matmul, quant
from tinyserve.tensor.arena import aligned
from tinyserve.tensor.matmul import Epilogue
from tinyserve.tensor.norm import NO_NORM, Norm
from tinyserve.tensor.quant import IntegerWeights

Array = np.ndarray

_ONE = np.float32(1.0)
_EMPTY = np.empty(0, np.float32)


class Matrix(ABC):
    """A packed weight matrix of N outputs by K inputs."""

    shape: tuple[int, int]

    @property
    @abstractmethod
    def nbytes(self) -> int: ...

    @property
    @abstractmethod
    def bits(self) -> int:
        """Of a weight, without the scales."""

    @abstractmethod
    def rows(self, ids: Array) -> Array:
        """Rows `ids` (tokens,) -> (tokens, K) float32: what an embedding looks up."""

    def matmul(
        self,
        x: Array,
        bias: Array = _EMPTY,
        *,
        norm: Norm = NO_NORM,
        scale: np.float32 = _ONE,
        activation: int = matmul.PLAIN,
        residual: Array = matmul.NOTHING,
        width: int | None = None,
    ) -> Array:
        """x (tokens, K) -> activation(scale · (norm(x) · Wᵀ + bias)) + residual (tokens, width), all float32.

        Empty arrays are no bias and no residual. `width` is N unless given, as it must be for SILU_MUL.
        """
        return self.product(x, norm, Epilogue(bias, scale, activation), residual, width or self.shape[0])

    def grouped_matmul(
        self, x: Array, offsets: Array, *, norm: Norm, scale: np.float32, activation: int, width: int
    ) -> Array:
        """The same for a matrix that is several ones above the other, without bias and residual.

        Rows offsets[e] .. offsets[e + 1] of x (rows, K) meet the e-th of them; offsets (experts + 1,) int64, and each
        has as many rows, a multiple of quant.BLOCK.
        """
        return self.grouped_product(x, norm, offsets, Epilogue(_EMPTY, scale, activation), width)

    @abstractmethod
    def product(self, x: Array, norm: Norm, after: Epilogue, residual: Array, width: int) -> Array:
        """`matmul`, of groups that are made once."""

    @abstractmethod
    def grouped_product(self, x: Array, norm: Norm, offsets: Array, after: Epilogue, width: int) -> Array:
        """`grouped_matmul`, of groups that are made once."""


class FloatMatrix(Matrix):
    """Weights in float32 or bfloat16; sums in float32 either way."""

    def __init__(self, shape: tuple[int, int], packed: Array):
        self.shape, self.packed = shape, packed

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    @property
    def bits(self) -> int:
        return 8 * self.packed.itemsize

    def rows(self, ids: Array) -> Array:
        return quant.take_rows_float(self.packed, ids, self.shape[1])

    def product(self, x: Array, norm: Norm, after: Epilogue, residual: Array, width: int) -> Array:
        return matmul.matmul_float(x, norm, self.packed, after, residual, width)

    def grouped_product(self, x: Array, norm: Norm, offsets: Array, after: Epilogue, width: int) -> Array:
        return grouped_matmul.grouped_matmul_float(x, norm, offsets, self.packed, after, width)


class IntegerMatrix(Matrix):
    """Weights of 8 or 4 bits with a scale a group, multiplied with activations of 16 or 8."""

    def __init__(self, shape: tuple[int, int], packed: IntegerWeights, activation_bits: int):
        self.shape, self.packed = shape, packed
        self.rounding = quant.Rounding.to(activation_bits, packed)

    @property
    def nbytes(self) -> int:
        return self.packed.stream.nbytes

    @property
    def bits(self) -> int:
        return 8 if self.packed.stream.dtype == np.int8 else 4

    def rows(self, ids: Array) -> Array:
        return quant.take_rows_integer(self.packed, ids, self.shape[1])

    def product(self, x: Array, norm: Norm, after: Epilogue, residual: Array, width: int) -> Array:
        return matmul.matmul_integer(x, norm, self.rounding, self.packed, after, residual, width)

    def grouped_product(self, x: Array, norm: Norm, offsets: Array, after: Epilogue, width: int) -> Array:
        return grouped_matmul.grouped_matmul_integer(x, norm, self.rounding, offsets, self.packed, after, width)


def pack(weight: Array, dtype: str) -> Matrix:
    """weight (N outputs, K inputs) float32 -> the matrix that this dtype's kernels read.

    Raises OverflowError for weights too large for a float16 scale.
    """
    return pack_parts([weight], weight.shape, dtype)


def pack_parts(parts: Iterable[Array], shape: tuple[int, int], dtype: str) -> Matrix:
    """The same for a matrix whose rows come in parts, each of them but the last a multiple of quant.BLOCK."""
    kind = WEIGHT_DTYPES[dtype]
    if not kind.is_integer:
        bfloat16 = kind.weight_bits == 16
        return FloatMatrix(shape, stacked((quant.pack_float(part, bfloat16) for part in parts), shape[0]))
    stream = stacked((_pack_integers(part, dtype).stream for part in parts), shape[0])
    return IntegerMatrix(shape, IntegerWeights.of(stream), kind.activation_bits)


def _pack_integers(weight: Array, dtype: str) -> IntegerWeights:
    kind = WEIGHT_DTYPES[dtype]
    packed = (quant.pack_bytes if kind.weight_bits == 8 else quant.pack_nibbles)(weight, kind.group_size)
    if not packed.is_finite():
        raise OverflowError(f"weights reach {np.abs(weight).max():.3g}, which no {kind.weight_bits}-bit scale holds")
    return packed


def stacked(streams: Iterable[Array], rows: int) -> Array:
    """The packed parts of a matrix of so many rows as one; of the parts there is never more than one."""
    total, done = quant.padded(rows, quant.BLOCK) // quant.PAIR, 0
    whole = None
    for stream in streams:
        pairs = len(stream)
        if pairs == total:
            return stream
        if whole is None:
            whole = aligned((total, *stream.shape[1:]), stream.dtype)
        whole[done : done + pairs] = stream
        done += pairs
    assert whole is not None
    return whole


def repack(blocks: gguf_blocks.Blocks, dtype: str) -> IntegerWeights | None:
    """GGUF's blocks as this dtype's kernels read them, without going through floats; None where that cannot be.

    8 bits are "at most 8": a file's 4 bits stay what they are.
    """
    kind = WEIGHT_DTYPES[dtype]
    return gguf_blocks.repack(blocks, most_bits=kind.weight_bits) if kind.is_integer else None


def no_bias() -> Array:
    """The empty array that means "no bias" to every kernel."""
    return _EMPTY


def read_only(array: Array) -> Array:
    """The array, which nobody may write to from here on."""
    array.flags.writeable = False
    return array
