"""How weights are kept: the policy that turns one float32 matrix into what a kernel multiplies with.

Knows dtypes and their kernels; it does not know which layer a matrix belongs to.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyserve.models.dtypes import WEIGHT_DTYPES
from tinyserve.tensor import dot_product, gguf_blocks, grouped_matmul, matmul, norm, quant

Array = np.ndarray

_ONE = np.float32(1.0)
_EMPTY = np.empty(0, np.float32)
_EMPTY.flags.writeable = False
_EMPTY_ROWS = np.empty((0, 0), np.float32)  # writable, as residuals are


@dataclass(frozen=True)
class Norm:
    """A norm that a product begins with: its kind (tensor/norm.py), weight and bias (inputs,), and epsilon."""

    kind: int
    weight: Array
    bias: Array
    eps: np.float32


NO_NORM = Norm(norm.NONE, _EMPTY, _EMPTY, np.float32(0.0))


class Matrix(ABC):
    """A packed weight matrix of N outputs by K inputs."""

    shape: tuple[int, int]

    @property
    @abstractmethod
    def nbytes(self) -> int: ...

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
        residual: Array = _EMPTY_ROWS,
        width: int | None = None,
    ) -> Array:
        """x (tokens, K) -> activation(scale · (norm(x) · Wᵀ + bias)) + residual (tokens, width), all float32.

        Empty arrays are no bias and no residual. `width` is N unless given, as it must be for SILU_MUL.
        """
        before = (x, norm.kind, norm.weight, norm.bias, norm.eps)
        return self._product(before, (width or self.shape[0], bias, scale, activation, residual))

    def grouped_matmul(
        self, x: Array, offsets: Array, *, norm: Norm, scale: np.float32, activation: int, width: int
    ) -> Array:
        """The same for a matrix that is several ones above the other, without bias and residual.

        Rows offsets[e] .. offsets[e + 1] of x (rows, K) meet the e-th of them; offsets (experts + 1,) int64, and each
        has as many rows, a multiple of quant.BLOCK.
        """
        before = (x, norm.kind, norm.weight, norm.bias, norm.eps)
        return self._grouped_product(before, offsets, (width, scale, activation))

    @abstractmethod
    def _product(self, before: tuple[Any, ...], after: tuple[Any, ...]) -> Array: ...

    @abstractmethod
    def _grouped_product(self, before: tuple[Any, ...], offsets: Array, after: tuple[Any, ...]) -> Array: ...


class FloatMatrix(Matrix):
    """Weights in float32 or bfloat16; sums in float32 either way."""

    def __init__(self, shape: tuple[int, int], packed: Array):
        self.shape, self.packed = shape, read_only(packed)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def rows(self, ids: Array) -> Array:
        return quant.take_rows_float(self.packed, ids, self.shape[1])

    def _product(self, before: tuple[Any, ...], after: tuple[Any, ...]) -> Array:
        return matmul.matmul_float(*before, self.packed, *after)

    def _grouped_product(self, before: tuple[Any, ...], offsets: Array, after: tuple[Any, ...]) -> Array:
        return grouped_matmul.grouped_matmul_float(*before, offsets, self.packed, *after)


class IntegerMatrix(Matrix):
    """Weights of 8 or 4 bits with a scale a group, multiplied with activations of 16 or 8."""

    def __init__(self, shape: tuple[int, int], packed: quant.Packed, activation_bits: int):
        self.shape, self._activation_bits = shape, activation_bits
        self.packed, self.scales, self.minimums = map(read_only, packed)
        bits = 8 if self.packed.dtype == np.int8 else 4
        self._kind = quant.activation_kind(activation_bits, bits)
        self._largest = np.float32(quant.LARGEST_16 if activation_bits == 16 else quant.LARGEST_8)
        zeros = {8: 0 if dot_product.SIGNED else quant.ZERO_8, 4: 0 if self.minimums.size else quant.ZERO_4}
        self._zero = zeros[bits]

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes + self.minimums.nbytes

    def rows(self, ids: Array) -> Array:
        return quant.take_rows_integer(self.packed, self.scales, self.minimums, ids, self.shape[1])

    def _product(self, before: tuple[Any, ...], after: tuple[Any, ...]) -> Array:
        return matmul.matmul_integer(*before, *self._rounding, *self._kept, *after)

    def _grouped_product(self, before: tuple[Any, ...], offsets: Array, after: tuple[Any, ...]) -> Array:
        return grouped_matmul.grouped_matmul_integer(*before, *self._rounding, offsets, *self._kept, *after)

    @property
    def _rounding(self) -> tuple[Any, ...]:
        return self._kind, self._largest, self._zero

    @property
    def _kept(self) -> tuple[Array, ...]:
        return self.packed, self.scales, self.minimums


def pack(weight: Array, dtype: str) -> Matrix:
    """weight (N outputs, K inputs) float32 -> the matrix that this dtype's kernels read.

    Raises OverflowError for weights too large for a float16 scale.
    """
    return pack_parts([weight], weight.shape, dtype)


def pack_parts(parts: Iterable[Array], shape: tuple[int, int], dtype: str) -> Matrix:
    """The same for a matrix whose rows come in parts, each of them but the last a multiple of quant.BLOCK."""
    kind = WEIGHT_DTYPES[dtype]
    if not kind.is_integer:
        panels = ((quant.pack_float(part, bfloat16=kind.weight_bits == 16),) for part in parts)
        return FloatMatrix(shape, *stack_panels(panels, shape[0]))
    packed = stack_panels((_pack_integers(part, dtype) for part in parts), shape[0])
    return IntegerMatrix(shape, quant.Packed(*packed), kind.activation_bits)


def _pack_integers(weight: Array, dtype: str) -> quant.Packed:
    kind = WEIGHT_DTYPES[dtype]
    packed = (quant.pack_bytes if kind.weight_bits == 8 else quant.pack_nibbles)(weight, kind.group_size)
    if not packed.is_finite():
        raise OverflowError(f"weights reach {np.abs(weight).max():.3g}, which no {kind.weight_bits}-bit scale holds")
    return packed


def stack_panels(parts: Iterable[tuple[Array, ...]], rows: int) -> tuple[Array, ...]:
    """Packed parts of a matrix of so many rows as one; of the parts there is never more than one."""
    whole: tuple[Array, ...] = ()
    total, done = quant.padded(rows, quant.BLOCK) // quant.PANEL, 0
    for part in parts:
        panels = len(part[0])
        if panels == total:
            return tuple(part)
        whole = whole or tuple(
            np.empty((total, *array.shape[1:]), array.dtype) if array.size else array for array in part
        )
        for into, array in zip(whole, part, strict=True):
            if array.size:
                into[done : done + panels] = array
        done += panels
    return whole


def repack(blocks: gguf_blocks.Blocks, dtype: str) -> quant.Packed | None:
    """GGUF's blocks as this dtype's kernels read them, without going through floats; None where that cannot be.

    8 bits are "at most 8": a file's 4 bits stay what they are.
    """
    kind = WEIGHT_DTYPES[dtype]
    return gguf_blocks.repack(blocks, most_bits=kind.weight_bits) if kind.is_integer else None


def no_bias() -> Array:
    """The empty array that means "no bias" to every kernel."""
    return _EMPTY


def no_residual() -> Array:
    """The empty array that means "nothing to add" to every kernel."""
    return _EMPTY_ROWS


def read_only(array: Array) -> Array:
    """The array, which nobody may write to from here on."""
    # Weights read-only and activations writable are one compiled kernel each; mixed, they would be many.
    array.flags.writeable = False
    return array
