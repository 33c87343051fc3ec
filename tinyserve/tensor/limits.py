"""What this machine can do at most: bytes read from memory, and a matrix product's operations, each in a second.

Knows no model. Every measurement is the best of several passes by all threads; its kernel writes sums that depend on
all that was read or multiplied, so that no compiler can leave the work out.
"""

from collections.abc import Callable
from time import perf_counter

import numpy as np

from tinyserve.tensor._jit import kernel
from tinyserve.tensor.matmul import FLOAT_PANELS, FLOAT_ROWS
from tinyserve.tensor.program import allocating_instruction, instruction, num_threads
from tinyserve.tensor.quant import PAIR, PANEL, activation_dtype
from tinyserve.tensor.simd import LANES, load, splat, sum_lanes
from tinyserve.tensor.thread_pool import next_items, own_items
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
    sums = np.empty(64, np.float32)
    return best_rate(lambda passes: [read_all(array, sums) for _ in range(passes)], longest=1) * array.nbytes


def integer_peak(weight_bits: int, activation_bits: int) -> float:
    """Multiplications and additions a second of the integer dot product, beside weights of 8 or 4 bits."""
    pairs = (PANELS + 1) // 2
    w = np.ones(pairs * PAIR * INPUTS * weight_bits // 8, np.int8 if weight_bits == 8 else np.uint8)
    q: np.ndarray = np.ones((ROWS, INPUTS), activation_dtype(activation_bits, weight_bits))
    out = np.empty((num_threads(), ROWS, PANELS * PANEL), np.float32)
    rounds = best_rate(lambda rounds: dot_in_registers(w, q, rounds, out))
    return rounds * len(out) * 2 * ROWS * PANELS * PANEL * INPUTS


def float_peak() -> float:
    """Multiplications and additions a second in float32."""
    w = np.ones(FLOAT_PANELS * PANEL * INPUTS, np.float32)
    x = np.ones((FLOAT_ROWS, INPUTS), np.float32)
    out = np.empty((num_threads(), FLOAT_ROWS, FLOAT_PANELS * PANEL), np.float32)
    rounds = best_rate(lambda rounds: fma_in_registers(w, x, rounds, out))
    return rounds * len(out) * 2 * FLOAT_ROWS * FLOAT_PANELS * PANEL * INPUTS


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


@instruction
def read_all(team, array, sums):
    """array (n,) float32, n a multiple of 4096 -> sums (64,), what each part of it adds up to."""
    size = array.size // 64
    first, last = next_items(team, 64)
    while first < last:
        for part in range(first, last):
            a = b = c = d = splat(np.float32(0.0))
            for i in range(part * size, (part + 1) * size, 4 * LANES):
                a = a + load(array, i)
                b = b + load(array, i + LANES)
                c = c + load(array, i + 2 * LANES)
                d = d + load(array, i + 3 * LANES)
            sums[part] = sum_lanes((a + b) + (c + d))
        first, last = next_items(team, 64)


@kernel
def _dot_item(w, q, rounds, out, at):
    """The tile of matmul.py over the same weights again and again; the sums wrap around, which takes no time."""
    K = q.shape[1]
    start, one = np.zeros(1, np.int32), np.ones(1, np.float32)
    inputs = inputs_per_load(w)
    stride = 4 * PAIR * (K // inputs)
    sums = start_rows(ROWS, PANELS, q, start, 0, 0)
    for _ in range(rounds):
        for k in range(0, K, 32):
            part = begin_part(sums, w, q)
            for i in range(k, k + 32, inputs):
                part = dot_rows(part, PANELS, w, 4 * PAIR * (i // inputs), stride, q, i, K)
            sums = end_part(sums, part)
    scales = load_tile(PANELS, np.ones(PANELS * PANEL, np.float32), 0, PANEL)
    total = scaled_rows(zeros(SIZE), sums, scales, one, 0, 0)
    store_rows(out, at, PANELS * PANEL, total, PANELS, PANELS * PANEL)


@allocating_instruction
def dot_in_registers(team, w, q, rounds, out):
    """The products of w (PANELS panels of 16 outputs, in pairs) with q (ROWS, K) `rounds` times over, for each item.

    Both as packed for matmul.py. -> out (items, ROWS, outputs) float32.
    """
    first, last = own_items(team, len(out))
    for item in range(first, last):
        _dot_item(w, q, rounds, out, item * SIZE * PANEL)


@kernel
def _fma_item(w, x, rounds, out, at):
    K = x.shape[1]
    total = zeros(FLOAT_SIZE)
    for _ in range(rounds):
        for k in range(K):
            total = fma_rows(total, load_tile(FLOAT_PANELS, w, k * PANEL, K * PANEL), x, k, K)
    store_rows(out, at, FLOAT_PANELS * PANEL, total, FLOAT_PANELS, FLOAT_PANELS * PANEL)


@allocating_instruction
def fma_in_registers(team, w, x, rounds, out):
    """The same in float32: w (panels, K, 16) flat, x (rows, K) -> out (items, rows, outputs)."""
    first, last = own_items(team, len(out))
    for item in range(first, last):
        _fma_item(w, x, rounds, out, item * FLOAT_SIZE * PANEL)
