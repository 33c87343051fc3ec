"""The matrix product y = x · Wᵀ, from the obvious loop to the kernel that tinyserve runs: each checked, each timed.

    python scripts/kernels/matmul.py
    python scripts/kernels/matmul.py --rows 512 --outputs 2048 --inputs 2048

Letters as in tinyserve/tensor/matmul.py: M rows of x, N outputs, K inputs. With 512 rows (a prompt) the limit is
arithmetic; with one (a token that is decoded) it is reading W, which is then made to come from memory. What was learned
is said in each version's first lines, and in docs/kernels.md with figures.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np

from tinyserve.models import matrix as matrices
from tinyserve.tensor import _jit, dot_product, matmul, reference, tiles
from tinyserve.tensor._jit import kernel
from tinyserve.tensor.mamba2 import broadcast
from tinyserve.tensor.norm import NONE
from tinyserve.tensor.quant import (
    BLOCK,
    LARGEST_8,
    LARGEST_16,
    NO_MINIMUMS,
    PANEL,
    ZERO_4,
    ZERO_8,
    activation_kind,
    quantize_row,
)
from tinyserve.tensor.simd import LANES, WIDE, fma, load, load_first, splat, store, sum_lanes
from tinyserve.tensor.tiles import (
    begin_part,
    dot_rows,
    end_part,
    fma_rows,
    inputs_per_load,
    load_tile,
    scaled_rows,
    start_rows,
    store_rows,
    zeros,
)

sys.path.insert(0, str(Path(__file__).parent))
import _workshop

Array = np.ndarray
NO_NUMBERS, ONE = matrices.no_bias(), np.float32(1.0)
NO_NORM = NONE, NO_NUMBERS, NO_NUMBERS, ONE
NOTHING_AFTER = NO_NUMBERS, ONE, matmul.PLAIN, matrices.no_residual()  # no bias, scale, activation, residual

# Every version: x (M, K) and the weights as its packing left them -> y (M, N, or more: panels are padded with zeros).


@kernel
def v1_obvious_loop(x, w):
    """The formula. The compiler may not reorder a sum of floats, so each addition waits for the one before it."""
    y = np.empty((x.shape[0], w.shape[0]), np.float32)
    for m in range(x.shape[0]):
        for n in range(w.shape[0]):
            total = np.float32(0.0)
            for k in range(x.shape[1]):
                total += x[m, k] * w[n, k]
            y[m, n] = total
    return y


@kernel
def v2_lanes_of_inputs(x, w):
    """A vector is 16 neighbouring inputs: 16 sums at once, but every output ends in a sum over lanes."""
    M, K = x.shape
    y = np.empty((M, w.shape[0]), np.float32)
    whole = K // LANES * LANES
    for m in range(M):
        for n in range(w.shape[0]):
            total = splat(np.float32(0.0))
            for k in range(0, whole, LANES):
                total = fma(load(x, m * K + k), load(w, n * K + k), total)
            rest = load_first(x, m * K + whole, K - whole) * load_first(w, n * K + whole, K - whole)
            y[m, n] = sum_lanes(total + rest)
    return y


@kernel
def v3_panels_of_outputs(x, w):
    """W is packed (N/16, K, 16): a vector is one input of 16 outputs. No sum over lanes, and no rest of K.

    But one vector of sums is one chain, and every step of it waits for the step before: a few cycles each.
    """
    M, K = x.shape
    N = w.shape[0] * PANEL
    y = np.empty((M, N), np.float32)
    for n in range(0, N, PANEL):
        for m in range(M):
            total = splat(np.float32(0.0))
            for k in range(K):
                total = fma(load(w, n * K + k * PANEL), broadcast(x, m * K + k), total)
            store(y, m * N + n, total)
    return y


def _float_tile(ROWS, PANELS):
    SIZE = ROWS * PANELS

    @kernel
    def tile(x, m, w, n, y):
        K, N = w.shape[1], y.shape[1]
        for p in range(n, n + BLOCK, PANELS * PANEL):
            total = zeros(SIZE)
            for k in range(K):
                weights = load_tile(PANELS, w, p * K + k * PANEL, K * PANEL)
                total = fma_rows(total, weights, x, m * K + k, K)
            store_rows(y, m * N + p, N, total, PANELS, PANELS * PANEL)

    return tile


# Of 16 registers of 8 floats, 6 rows by one panel need 12 for sums, 2 for weights and 1 for the factor; 3 by 2 need 17.
_float_tile_1, _float_tile_6 = _float_tile(1, 4), _float_tile(6, 4 if WIDE else 1)


@kernel
def v4_register_tile(x, w):
    """A few rows by a few panels: as many chains as there are registers, and each loaded vector serves several."""
    M, N = x.shape[0], w.shape[0] * PANEL
    y = np.empty((M, N), np.float32)
    for n in range(0, N, BLOCK):
        m = 0
        while m + 6 <= M:
            _float_tile_6(x, m, w, n, y)
            m += 6
        while m < M:
            _float_tile_1(x, m, w, n, y)
            m += 1
    return y


@kernel
def v5_bytes_widened(x, w, scales):
    """The same tile on W in 8 bits, (N/16, K, 16) int8 with a scale an output: bytes become floats as they are loaded.

    A quarter of the bytes to read, and two instructions more for each vector: good for one row, not for many.
    """
    y = v4_register_tile(x, w)
    for m in range(y.shape[0]):
        for n in range(0, y.shape[1], LANES):
            store(y, m * y.shape[1] + n, load(y, m * y.shape[1] + n) * load(scales, n))
    return y


def _integer_tile(ROWS, PANELS):
    SIZE = ROWS * PANELS

    @kernel
    def tile(q, starts, x_scales, m, w, w_scales, n, y):
        N, K, groups = y.shape[1], q.shape[1], w_scales.shape[1]
        inputs, group = inputs_per_load(w), K // groups
        w_stride, scale_stride = 4 * PANEL * w.shape[1], PANEL * groups
        w_at, scales_at = n // PANEL * w_stride, n // PANEL * scale_stride
        total = zeros(SIZE)
        for g in range(groups):
            sums = start_rows(ROWS, PANELS, q, starts, m * groups + g, groups)
            for k in range(g * group, (g + 1) * group, 32):
                part = begin_part(sums, w, q)
                for i in range(k, k + 32, inputs):
                    part = dot_rows(part, PANELS, w, w_at + 4 * PANEL * (i // inputs), w_stride, q, m * K + i, K)
                sums = end_part(sums, part)
            scales = load_tile(PANELS, w_scales, scales_at + g * PANEL, scale_stride)
            total = scaled_rows(total, sums, scales, x_scales, m * groups + g, groups)
        store_rows(y, m * N + n, N, total, PANELS, PANELS * PANEL)

    return tile


_integer_tile_1, _integer_tile_3 = _integer_tile(1, tiles.PANELS), _integer_tile(3, tiles.PANELS)


@kernel
def v6_integers(x, w, w_scales, kind, largest, zero):
    """x is rounded to 16 bits, and whole numbers are multiplied; each group of inputs ends with its two scales.

    The packing is tinyserve's (tensor/quant.py): four inputs of an output lie side by side, as the dot product eats
    them. The accumulator starts at -zero · Σx, because weights are kept unsigned.
    """
    M, N, groups = x.shape[0], w.shape[0] * PANEL, w_scales.shape[1]
    group = w.shape[1] * inputs_per_load(w) // groups
    q, starts = np.empty((M, groups * group), kind.dtype), np.empty((M, groups), np.int32)
    x_scales, x_sums = np.empty((M, groups), np.float32), np.empty((M, groups), np.float32)
    for m in range(M):
        quantize_row(x, m, q, starts, x_scales, x_sums, group, largest, zero)
    y = np.empty((M, N), np.float32)
    for n in range(0, N, tiles.PANELS * PANEL):
        m = 0
        while m + 3 <= M:
            _integer_tile_3(q, starts, x_scales, m, w, w_scales, n, y)
            m += 3
        while m < M:
            _integer_tile_1(q, starts, x_scales, m, w, w_scales, n, y)
            m += 1
    return y


def v6_in_4_bits(x, w, w_scales, kind, largest, zero):
    """The same kernel on nibbles, groups of 32: half the bytes again; two dot products for each vector that is loaded.

    The array's type chooses: 64 bytes of uint8 are eight inputs of 16 outputs, of int8 four.
    """
    return v6_integers(x, w, w_scales, kind, largest, zero)


def v7_tinyserves(x, w, w_scales, kind, largest, zero):
    """v6 in blocks of 64 outputs by 48 rows, shared among threads: tinyserve.tensor.matmul.matmul_integer.

    A row's part of x is used for four panels while it is in the nearest cache, and a block of y is finished there:
    bias, activation and residual, which are empty here, cost no pass over memory.
    """
    kept = (kind, largest, zero, w, w_scales, NO_MINIMUMS)
    return matmul.matmul_integer(x, *NO_NORM, *kept, w.shape[0] * PANEL, *NOTHING_AFTER)


# --- packing: W (N, K) float32 -> a version's arguments ---------------------------------------------------------------


def as_it_is(w: Array) -> tuple[Any, ...]:
    return (w,)


def in_panels(w: Array) -> tuple[Any, ...]:
    return (reference.pack_float(w, bfloat16=False),)


def in_bytes(w: Array) -> tuple[Any, ...]:
    """Panels of int8, and a scale for each output."""
    scales = np.abs(w).max(1) / np.float32(LARGEST_8)
    panels = reference.pack_float(np.rint(w / scales[:, None]), bfloat16=False)
    padded = np.zeros(len(panels) * PANEL, np.float32)
    padded[: len(scales)] = scales
    return panels.astype(np.int8), padded


def in_groups_of_bytes(w: Array) -> tuple[Any, ...]:
    matrix = matrices.pack(w, "w8a16")
    return (
        matrix.packed,
        matrix.scales,
        activation_kind(16, 8),
        np.float32(LARGEST_16),
        0 if dot_product.SIGNED else ZERO_8,
    )


def in_groups_of_nibbles(w: Array) -> tuple[Any, ...]:
    matrix = matrices.pack(w, "w4a16")
    return matrix.packed, matrix.scales, activation_kind(16, 4), np.float32(LARGEST_16), ZERO_4


class Version(NamedTuple):
    function: Callable[..., Array]
    pack: Callable[[Array], tuple[Any, ...]]
    integers: bool = False
    after: str | None = None  # the version whose time this one's is compared with, if not the one above
    threads: int = 1


VERSIONS = [
    Version(v1_obvious_loop, as_it_is),
    Version(v2_lanes_of_inputs, as_it_is),
    Version(v3_panels_of_outputs, in_panels),
    Version(v4_register_tile, in_panels),
    Version(v5_bytes_widened, in_bytes),
    Version(v6_integers, in_groups_of_bytes, integers=True, after="v4_register_tile"),
    Version(v6_in_4_bits, in_groups_of_nibbles, integers=True, after="v6_integers"),
    Version(v7_tinyserves, in_groups_of_bytes, integers=True, after="v6_integers"),
    Version(v7_tinyserves, in_groups_of_bytes, integers=True, threads=2),
]


def check(version: Version, M: int = 7, N: int = 70, K: int = 100) -> None:
    """Raise AssertionError unless the version computes what tensor/reference.py does; the shape fits no tile."""
    x, w = inputs(M, N, K)
    packed = version.pack(w)
    _jit.set_threads(version.threads)
    got = version.function(x, *packed)[:, :N]
    if version.integers:
        integers, scales, kind, largest, zero = packed
        kept = (kind, largest, zero, integers, scales, NO_MINIMUMS)
        expected = reference.matmul_integer(x, *NO_NORM, *kept, N, *NOTHING_AFTER)
    else:
        if version.pack is in_bytes:
            w = reference.unpack_float(packed[0].astype(np.float32), N) * packed[1][:N, None]
        expected = reference.matmul_float(x, *NO_NORM, *in_panels(w), N, *NOTHING_AFTER)
    difference = _workshop.error(got, expected)
    assert difference < 1e-5, f"{version.function.__name__} is wrong by {difference:.1e}"


def inputs(M: int, N: int, K: int) -> tuple[Array, Array]:
    """x (M, K) and W (N, K)."""
    random = np.random.default_rng(0)
    return random.standard_normal((M, K), dtype=np.float32), random.standard_normal((N, K), dtype=np.float32)


def climb(M: int, N: int, K: int) -> None:
    """Time every version on one shape."""
    limit = "% of memory" if M == 1 else "% of peak"
    table = _workshop.Table(f"{M} × {K} times {K} × {N}", M * N * K, limit)
    x, w = inputs(M, N, K)
    for version in VERSIONS:
        packed = version.pack(w)
        weights = _workshop.far_apart(packed) if M == 1 else [packed]
        calls = [lambda version=version, each=each: version.function(x, *each) for each in weights]
        seconds = _workshop.shortest(calls, version.threads)
        peak = _workshop.integer_peak() if version.integers else _workshop.float_peak()
        least = _workshop.nbytes(packed) / _workshop.reading_speed() if M == 1 else table.products / peak
        table.row(_workshop.name(version), seconds, least / (1 if M == 1 else version.threads), version.after)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the matrix product from the obvious loop to tinyserve's kernel.")
    parser.add_argument("--rows", type=int, help="M; 1 and 512 unless told otherwise")
    parser.add_argument("--outputs", type=int, help="N, a multiple of 64; 1536 and 2048 unless told otherwise")
    parser.add_argument("--inputs", type=int, help="K; 576 and 2048 unless told otherwise")
    args = parser.parse_args()
    for version in VERSIONS:
        check(version)  # also compiles it
    _workshop.describe_machine()
    for N, K in [(1536, 576), (2048, 2048)] if not args.outputs else [(args.outputs, args.inputs or args.outputs)]:
        for M in [args.rows] if args.rows else [1, 512]:
            climb(M, N, K)


if __name__ == "__main__":
    main()
