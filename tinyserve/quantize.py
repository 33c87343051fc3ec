"""How weights are kept: the policy that turns one float32 matrix into what a kernel multiplies with.

Knows dtypes and their kernels; it does not know which layer a matrix belongs to, beyond "embedding" and "not".
"""

import difflib
from typing import Protocol

import numpy as np

from tinyserve.errors import UserError
from tinyserve.tensor import matmul, quant

Array = np.ndarray

GROUP = 64  # inputs that share a scale in 8-bit weights
DTYPES = ("float32", "bfloat16", "w8a16")
ALIASES = {"int8": "w8a16", "auto": "w8a16", "fp32": "float32", "bf16": "bfloat16"}
_EMPTY = np.empty(0, np.float32)
_EMPTY.flags.writeable = False


def resolve_dtype(name: str) -> str:
    """A dtype's own name; raises UserError that lists the dtypes."""
    dtype = ALIASES.get(name, name) if isinstance(name, str) else ""
    if dtype in DTYPES:
        return dtype
    nearest = difflib.get_close_matches(str(name), (*DTYPES, *ALIASES), n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"dtype {name!r} is not built; there are {', '.join(DTYPES)}, and int8 and auto for w8a16.{hint}")


class Matrix(Protocol):
    """A packed weight matrix of N outputs by K inputs."""

    shape: tuple[int, int]

    @property
    def nbytes(self) -> int: ...

    def matmul(self, x: Array, bias: Array) -> Array:
        """x (tokens, K) float32 -> x · Wᵀ + bias (tokens, N) float32; an empty bias is none."""
        ...

    def rows(self, ids: Array) -> Array:
        """Rows `ids` (tokens,) -> (tokens, K) float32: what an embedding looks up."""
        ...


class FloatMatrix:
    """Weights in float32 or bfloat16; sums in float32 either way."""

    def __init__(self, weight: Array, bfloat16: bool):
        self.shape: tuple[int, int] = weight.shape
        self.packed = _read_only(quant.pack_float(weight, bfloat16))

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def matmul(self, x: Array, bias: Array) -> Array:
        return matmul.matmul_float(x, self.packed, bias, self.shape[0])

    def rows(self, ids: Array) -> Array:
        return quant.take_rows_float(self.packed, ids, self.shape[1])


class Int8Matrix:
    """Weights of 8 bits with a scale a group, multiplied with activations of 16 bits ("w8a16")."""

    def __init__(self, weight: Array):
        self.shape: tuple[int, int] = weight.shape
        self.packed, self.scales = map(_read_only, quant.pack_int8(weight, GROUP))

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes

    def matmul(self, x: Array, bias: Array) -> Array:
        return matmul.matmul_int8(x, self.packed, self.scales, bias, self.shape[0])

    def rows(self, ids: Array) -> Array:
        return quant.take_rows_int8(self.packed, self.scales, ids, self.shape[1])


def pack(weight: Array, dtype: str) -> Matrix:
    """weight (N outputs, K inputs) float32 -> the matrix that this dtype's kernels read."""
    if dtype == "w8a16":
        return Int8Matrix(weight)
    return FloatMatrix(weight, bfloat16=dtype == "bfloat16")


def no_bias() -> Array:
    """The empty array that means "no bias" to every kernel."""
    return _EMPTY


def _read_only(array: Array) -> Array:
    # Weights read-only and activations writable are one compiled kernel each; mixed, they would be many.
    array.flags.writeable = False
    return array
