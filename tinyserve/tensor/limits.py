"""What this machine can do at most: bytes read from memory, and a matrix product's operations, each in a second.

Knows no model. Every measurement is the best of several passes by all threads; its kernel returns sums that depend on
all that was read or multiplied, so that no compiler can leave the work out.
"""

from collections.abc import Callable
from time import perf_counter

import numpy as np
from numba import get_num_threads, prange

from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.matmul import FLOAT_PANELS, FLOAT_ROWS
from tinyserve.tensor.quant import PANEL, activation_kind
from tinyserve.tensor.simd import LANES, load, splat, sum_lanes
from tinyserve.tensor.tiles import (
    PANELS,
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

ROWS = 3  # of activations in a register tile, as in matmul.py
SIZE, FLOAT_SIZE = ROWS * PANELS, FLOAT_ROWS * FLOAT_PANELS
INPUTS = 128  # weights of so many inputs, and their activations, stay in the nearest cache
READ = 384 << 20  # bytes, many times what a cache holds
PASS = 0.002  # seconds that a pass over the registers takes at least: short, to fit between what others run
PASSES = 24


def memory_bandwidth(nbytes: int = READ) -> float:
    """Bytes a second that all threads together read from an array of this size."""
    array = np.ones(nbytes // 4, np.float32)  # written, so that its pages are there
    return best_rate(lambda passes: [read_all(array) for _ in range(passes)], longest=1) * array.nbytes


def integer_peak(weight_bits: int, activation_bits: int) -> float:
    """Multiplications and additions a second of the integer dot product, beside weights of 8 or 4 bits."""
    w = np.ones(PANELS * PANEL * INPUTS * weight_bits // 8, np.int8 if weight_bits == 8 else np.uint8)
    bytes_an_input = 2 if activation_kind(activation_bits, weight_bits).dtype == np.int16 else 1
    q = np.ones((ROWS, INPUTS * bytes_an_input), np.int8).view(f"i{bytes_an_input}")
    items = get_num_threads()
    rounds = best_rate(lambda rounds: dot_in_registers(w, q, rounds, items))
    return rounds * items * 2 * ROWS * PANELS * PANEL * INPUTS


def float_peak() -> float:
    """Multiplications and additions a second in float32."""
    w = np.ones(FLOAT_PANELS * PANEL * INPUTS, np.float32)
    x = np.ones((FLOAT_ROWS, INPUTS), np.float32)
    items = get_num_threads()
    rounds = best_rate(lambda rounds: fma_in_registers(w, x, rounds, items))
    return rounds * items * 2 * FLOAT_ROWS * FLOAT_PANELS * PANEL * INPUTS


def best_rate(run: Callable[[int], object], longest: int = 1 << 40) -> float:
    """Rounds a second of `run`, given a number of them: as many as fill a pass, or `longest`; the best pass counts."""

    def seconds(rounds: int) -> float:
        start = perf_counter()
        run(rounds)
        return perf_counter() - start

    run(1)  # compiles
    enough = PASS + min(seconds(1) for _ in range(3))  # on a busy machine, waking the threads may take the longest
    rounds, passes, best = 1, 0, 0.0
    while passes < PASSES:
        took = seconds(rounds)
        best = max(best, rounds / took)
        if took < enough and rounds < longest:
            rounds *= 2
        else:
            passes += 1
    return best


@parallel_kernel
def read_all(array):
    """array (n,) float32, n a multiple of 4096 -> (64,) what each part of it adds up to."""
    sums = np.empty(64, np.float32)
    size = array.size // 64
    for part in prange(64):
        a = b = c = d = splat(np.float32(0.0))
        for i in range(np.int64(part) * size, np.int64(part + 1) * size, 4 * LANES):
            a = a + load(array, i)
            b = b + load(array, i + LANES)
            c = c + load(array, i + 2 * LANES)
            d = d + load(array, i + 3 * LANES)
        sums[part] = sum_lanes((a + b) + (c + d))
    return sums


@kernel
def _dot_item(w, q, rounds, out, at):
    """The tile of matmul.py over the same weights again and again; the sums wrap around, which takes no time."""
    K = q.shape[1]
    start, one = np.zeros(1, np.int32), np.ones(1, np.float32)
    inputs = inputs_per_load(w)
    stride = 4 * PANEL * (K // inputs)
    sums = start_rows(ROWS, PANELS, q, start, 0, 0)
    for _ in range(rounds):
        for k in range(0, K, 32):
            part = begin_part(sums, w, q)
            for i in range(k, k + 32, inputs):
                part = dot_rows(part, PANELS, w, 4 * PANEL * (i // inputs), stride, q, i, K)
            sums = end_part(sums, part)
    scales = load_tile(PANELS, np.ones(PANELS * PANEL, np.float32), 0, PANEL)
    total = scaled_rows(zeros(SIZE), sums, scales, one, 0, 0)
    store_rows(out, at, PANELS * PANEL, total, PANELS, PANELS * PANEL)


@parallel_kernel
def dot_in_registers(w, q, rounds, items):
    """The products of w (PANELS panels of 16 outputs) with q (ROWS, K) `rounds` times over, by each of `items`.

    Both as packed for matmul.py. -> (items, ROWS, outputs) float32.
    """
    out = np.empty((items, ROWS, PANELS * PANEL), np.float32)
    for item in prange(items):
        _dot_item(w, q, rounds, out, np.int64(item) * SIZE * PANEL)
    return out


@kernel
def _fma_item(w, x, rounds, out, at):
    K = x.shape[1]
    total = zeros(FLOAT_SIZE)
    for _ in range(rounds):
        for k in range(K):
            total = fma_rows(total, load_tile(FLOAT_PANELS, w, k * PANEL, K * PANEL), x, k, K)
    store_rows(out, at, FLOAT_PANELS * PANEL, total, FLOAT_PANELS, FLOAT_PANELS * PANEL)


@parallel_kernel
def fma_in_registers(w, x, rounds, items):
    """The same in float32: w (panels, K, 16) flat, x (rows, K) -> (items, rows, outputs)."""
    out = np.empty((items, FLOAT_ROWS, FLOAT_PANELS * PANEL), np.float32)
    for item in prange(items):
        _fma_item(w, x, rounds, out, np.int64(item) * FLOAT_SIZE * PANEL)
    return out
