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
from tinyserve.tensor import _jit, matmul, reference
from tinyserve.tensor._jit import cached_kernel, kernel
from tinyserve.tensor.mamba2 import broadcast
from tinyserve.tensor.matmul import Epilogue, QuantizedRows
from tinyserve.tensor.norm import NO_NORM
from tinyserve.tensor.program import Arena, Program, capture
from tinyserve.tensor.quant import BLOCK, LARGEST_8, PAIR, PANEL, IntegerWeights, Rounding, padded, quantize_row
from tinyserve.tensor.simd import LANES, WIDE, fma, load, load_first, splat, store, sum_lanes
from tinyserve.tensor.tiles import (
    PANELS,
    begin_part,
    dot_rows,
    end_part,
    fma_rows,
    inputs_per_load,
    load_scales,
    load_tile,
    scaled_rows,
    start_rows,
    store_rows,
    zeros,
)

sys.path.insert(0, str(Path(__file__).parent))
import _workshop

Array = np.ndarray
NOTHING_AFTER = Epilogue(matrices.no_bias(), np.float32(1.0), matmul.PLAIN)

# Every version: x (M, K) and the weights as its packing left them -> y (M, N, or more: panels are padded with zeros).


@cached_kernel
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


@cached_kernel
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


@cached_kernel
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


@cached_kernel
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


@cached_kernel
def v5_bytes_widened(x, w, scales):
    """The same tile on W in 8 bits, (N/16, K, 16) int8 with a scale an output: bytes become floats as they are loaded.

    A quarter of the bytes to read, and two instructions more for each vector: good for one row, not for many.
    """
    y = v4_register_tile(x, w)
    for m in range(y.shape[0]):
        for n in range(0, y.shape[1], LANES):
            store(y, m * y.shape[1] + n, load(y, m * y.shape[1] + n) * load(scales, n))
    return y


@kernel
def _rounded(x, group, groups, numbers, kept):
    """The rows of x as integers, in an array of the type of `kept`."""
    M = x.shape[0]
    q, starts = np.empty((M, groups * group), kept.dtype), np.empty((M, groups), np.int32)
    rows = QuantizedRows(q, starts, np.empty((M, groups), np.float32), np.empty((M, groups), np.float32))
    for m in range(M):
        quantize_row(x, m, rows, m, numbers)
    return rows


def _panel_tile(ROWS):
    @kernel
    def tile(rows, m, w, w_scales, panel, y):
        groups, K, N = w_scales.shape[1], rows.q.shape[1], y.shape[1]
        inputs, group = inputs_per_load(w), K // groups
        total = zeros(ROWS)
        for g in range(groups):
            sums = start_rows(ROWS, 1, rows.q, rows.starts, m * groups + g, groups)
            for k in range(g * group, (g + 1) * group, 32):
                part = begin_part(sums, w, rows.q)
                for i in range(k, k + 32, inputs):
                    here = (panel * w.shape[1] + i // inputs) * 4 * PANEL
                    part = dot_rows(part, 1, w, here, 0, rows.q, m * K + i, K)
                sums = end_part(sums, part)
            scales = load_tile(1, w_scales, (panel * groups + g) * PANEL, 0)
            total = scaled_rows(total, sums, scales, rows.scales, m * groups + g, groups)
        store_rows(y, m * N + panel * PANEL, N, total, 1, PANEL)

    return tile


_panel_tile_1, _panel_tile_3 = _panel_tile(1), _panel_tile(3)


@cached_kernel
def v6_integers(x, w, w_scales, numbers, kept):
    """x is rounded to 16 bits, and whole numbers are multiplied; each group of inputs ends with its two scales.

    W is (N/16, K/4, 64) int8: panel after panel, four inputs of an output side by side, as the dot product eats them;
    scales are in an array of their own. Sums start at -zero · Σx, because weights are kept unsigned.
    """
    M, (panels, groups, _) = x.shape[0], w_scales.shape
    rows = _rounded(x, w.shape[1] * inputs_per_load(w) // groups, groups, numbers, kept)
    y = np.empty((M, panels * PANEL), np.float32)
    for panel in range(panels):
        m = 0
        while m + 3 <= M:
            _panel_tile_3(rows, m, w, w_scales, panel, y)
            m += 3
        while m < M:
            _panel_tile_1(rows, m, w, w_scales, panel, y)
            m += 1
    return y


def _stream_tile(ROWS, PANELS):
    SIZE = ROWS * PANELS

    @kernel
    def tile(rows, m, w, panel, y):
        stream, group, N = w.stream, w.group, y.shape[1]
        groups, size = stream.shape[1], stream.shape[2]
        inputs, K, pair = inputs_per_load(stream), groups * group, groups * size
        total = zeros(SIZE)
        for g in range(groups):
            at = panel // 2 * pair + g * size
            sums = start_rows(ROWS, PANELS, rows.q, rows.starts, m * groups + g, groups)
            for k in range(0, group, 32):
                part = begin_part(sums, stream, rows.q)
                for i in range(k, k + 32, inputs):
                    here = at + 2 * PAIR + i // inputs * 4 * PAIR + panel % 2 * 4 * PANEL
                    part = dot_rows(part, PANELS, stream, here, pair, rows.q, m * K + g * group + i, K)
                sums = end_part(sums, part)
            scales = load_scales(PANELS, stream, at + panel % 2 * 2 * PANEL, pair)
            total = scaled_rows(total, sums, scales, rows.scales, m * groups + g, groups)
        store_rows(y, m * N + panel * PANEL, N, total, PANELS, PANELS * PANEL)

    return tile


_stream_tile_1, _stream_tile_3 = _stream_tile(1, 2), _stream_tile(3, PANELS)


@cached_kernel
def v7_one_stream(x, w, numbers, kept):
    """The same numbers in the order of use: of two panels in turn, group after group, a group's scales before it.

    A processor that sees a program read on and on fetches ahead by itself; v6 reads short pieces from two places. And
    what lies between two panels of 16 can be a tile of both: twice as many sums that do not wait for each other.
    """
    M, groups = x.shape[0], w.stream.shape[1]
    rows = _rounded(x, w.group, groups, numbers, kept)
    y = np.empty((M, w.stream.shape[0] * PAIR), np.float32)
    for block in range(0, y.shape[1] // PANEL, BLOCK // PANEL):
        m = 0
        while m + 3 <= M:
            for panel in range(block, block + BLOCK // PANEL, PANELS):
                _stream_tile_3(rows, m, w, panel, y)
            m += 3
        while m < M:
            for panel in range(block, block + BLOCK // PANEL, 2):
                _stream_tile_1(rows, m, w, panel, y)
            m += 1
    return y


def v7_in_4_bits(x, w, numbers, kept):
    """The same kernel on nibbles, groups of 32: half the bytes again; two dot products for each vector that is loaded.

    The array's type chooses: 64 bytes of uint8 are eight inputs of 16 outputs, of int8 four.
    """
    return v7_one_stream(x, w, numbers, kept)


def v8_an_instruction(x, w, rounding):
    """v7 in blocks of 64 outputs by 48 rows, shared among threads: tinyserve.tensor.matmul.matmul_integer.

    A block of y is finished in the nearest cache: bias, activation and residual, which are empty here, cost no pass
    over memory. Called from Python, each product is a program of its own, to which threads are called and let go.
    """
    return matmul.matmul_integer(x, NO_NORM, rounding, w, NOTHING_AFTER, matmul.NOTHING, w.stream.shape[0] * PAIR)


def v9_tinyserves(x, w, rounding):
    """The same call, captured: all products are one program, and between two of them there is a barrier and no Python.

    The matrices of a model are so many products after each other; with one row each is some tens of microseconds.
    """
    return v8_an_instruction(x, w, rounding)


# --- packing: W (N, K) float32 -> a version's arguments ---------------------------------------------------------------


def as_it_is(w: Array) -> tuple[Any, ...]:
    return (w,)


def in_panels(w: Array) -> tuple[Any, ...]:
    """(N/16, K, 16), N padded with zeros to a multiple of 64."""
    N, K = w.shape
    full = np.zeros((padded(N, BLOCK), K), np.float32)
    full[:N] = w
    return (np.ascontiguousarray(full.reshape(-1, PANEL, K).transpose(0, 2, 1)),)


def in_bytes(w: Array) -> tuple[Any, ...]:
    """Panels of int8, and a scale for each output."""
    scales = np.zeros(padded(len(w), BLOCK), np.float32)
    scales[: len(w)] = np.abs(w).max(1) / np.float32(LARGEST_8)
    (panels,) = in_panels(np.rint(w / scales[: len(w), None]))
    return panels.astype(np.int8), scales


def in_a_stream(w: Array, dtype: str = "w8a16") -> tuple[Any, ...]:
    """As tinyserve packs it (tensor/quant.py)."""
    matrix = matrices.pack(w, dtype)
    assert isinstance(matrix, matrices.IntegerMatrix)
    return matrix.packed, matrix.rounding


def told_to_kernels(weights: IntegerWeights, rounding: Rounding) -> tuple[Any, ...]:
    return weights, rounding.numbers, np.empty(0, rounding.dtype)


def in_a_stream_of_bytes(w: Array) -> tuple[Any, ...]:
    return told_to_kernels(*in_a_stream(w))


def in_a_stream_of_nibbles(w: Array) -> tuple[Any, ...]:
    return told_to_kernels(*in_a_stream(w, "w4a16"))


def in_panels_of_bytes(w: Array) -> tuple[Any, ...]:
    """The stream's weights (N/16, K/4, 64), and its scales (N/16, groups, 16) float32."""
    weights, *others = in_a_stream_of_bytes(w)
    panels = 2 * len(weights.stream)
    integers = np.ascontiguousarray(weights.integers.transpose(0, 3, 1, 2, 4)).reshape(panels, -1, 4 * PANEL)
    scales = weights.scales.transpose(0, 2, 1, 3).astype(np.int16, order="C").view(np.float16)
    return integers, scales.reshape(panels, -1, PANEL).astype(np.float32), *others


class Version(NamedTuple):
    function: Callable[..., Array]
    pack: Callable[[Array], tuple[Any, ...]]
    after: str | None = None  # the version whose time this one's is compared with, if not the one above
    dtype: str | None = None  # of integers
    threads: int = 1
    captured: bool = False


VERSIONS = [
    Version(v1_obvious_loop, as_it_is),
    Version(v2_lanes_of_inputs, as_it_is),
    Version(v3_panels_of_outputs, in_panels),
    Version(v4_register_tile, in_panels),
    Version(v5_bytes_widened, in_bytes),
    Version(v6_integers, in_panels_of_bytes, "v4_register_tile", dtype="w8a16"),
    Version(v7_one_stream, in_a_stream_of_bytes, dtype="w8a16"),
    Version(v7_in_4_bits, in_a_stream_of_nibbles, dtype="w4a16"),
    Version(v8_an_instruction, in_a_stream, "v7_one_stream", dtype="w8a16"),
    Version(v9_tinyserves, in_a_stream, dtype="w8a16", captured=True),
    Version(v8_an_instruction, in_a_stream, dtype="w8a16", threads=2),
    Version(v9_tinyserves, in_a_stream, dtype="w8a16", threads=2, captured=True),
]


def captured(version: Version, x: Array, weights: list[tuple[Any, ...]]) -> tuple[Program, list[Array]]:
    """A program of the products with all these weights, and where their results are."""
    with capture(Arena()) as program:
        return program, [version.function(x, *each) for each in weights]


def check(version: Version, N: int = 70, K: int = 100) -> None:
    """Raise AssertionError unless the version computes what tensor/reference.py does; the shape fits no tile."""
    _jit.set_threads(version.threads)
    for M in (7, 1):
        x, w = inputs(M, N, K)
        packed = version.pack(w)
        if version.captured:
            program, (got,) = captured(version, x, [packed])
            program.run()
        else:
            got = version.function(x, *packed)
        if version.dtype:
            weights, rounding = in_a_stream(w, version.dtype)
            expected = reference.matmul_integer(x, NO_NORM, rounding, weights, NOTHING_AFTER, matmul.NOTHING, N)
        else:
            if version.pack is in_bytes:
                panels, scales = packed
                w = (panels * scales.reshape(-1, 1, PANEL)).transpose(0, 2, 1).reshape(-1, K)[:N]
            expected = reference.matmul_float(
                x, NO_NORM, reference.pack_float(w, False), NOTHING_AFTER, matmul.NOTHING, N
            )
        difference = _workshop.error(got[:, :N], expected)
        assert difference < 1e-5, f"{version.function.__name__} is wrong by {difference:.1e} with {M} rows"


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
        _jit.set_threads(version.threads)
        if version.captured:
            program, _ = captured(version, x, weights)
            seconds = _workshop.shortest([program.run], version.threads) / len(weights)
        else:
            calls = [lambda version=version, each=each: version.function(x, *each) for each in weights]
            seconds = _workshop.shortest(calls, version.threads)
        peak = _workshop.integer_peak() if version.dtype else _workshop.float_peak()
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
