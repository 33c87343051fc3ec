"""Matrix products y = x · Wᵀ + bias for weights in float32, bfloat16 and 8 bits.

Letters: M tokens, N outputs, K inputs; W is packed in panels of 16 outputs (tensor/quant.py). A register tile is a few
rows of x by 64 outputs; every row sums its K inputs in the same order whatever tile it is computed in, so a token's
numbers do not depend on who else is in the batch.
"""

import numpy as np
from numba import prange

from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.quant import BLOCK, PANEL, quantize_row
from tinyserve.tensor.simd import load_first, store_first
from tinyserve.tensor.tiles import dot_rows, fma_rows, load_tile, scaled_rows, start_rows, store_rows, zeros

PANELS = BLOCK // PANEL  # panels in a register tile
DIGITS = 2  # bytes of an activation, high and low
CHUNK = 48  # rows of x that stay in the cache while a block of weights passes over them


def _float_tile(ROWS):
    """A kernel for ROWS rows by one block of outputs."""

    SIZE = ROWS * PANELS

    @kernel
    def tile(x, w, y, m, n, K, N):
        total = zeros(SIZE)
        panel = PANEL * K
        for k in range(K):
            weights = load_tile(PANELS, w, n * K + k * PANEL, panel)
            total = fma_rows(total, weights, x, m * K + k, K)
        store_rows(y, m * N + n, N, total, PANELS, N - n)

    return tile


_float_tile_1, _float_tile_6 = _float_tile(1), _float_tile(6)


@kernel
def _add_bias(y, bias, m, n, rows, N):
    """y[m : m + rows, n : n + 64] += bias, while the numbers are still in the nearest cache."""
    for i in range(n, min(n + BLOCK, N), PANEL):
        b = load_first(bias, i, N - i)
        for r in range(m, m + rows):
            store_first(y, r * N + i, load_first(y, r * N + i, N - i) + b, N - i)


@parallel_kernel
def matmul_float(x, w, bias, N):
    """x (M, K) float32, w packed float32 or bfloat16, bias (N,) or empty -> y (M, N) float32."""
    M, K = x.shape
    y = np.empty((M, N), np.float32)
    chunks = (M + CHUNK - 1) // CHUNK
    items = chunks * (w.shape[0] // PANELS)
    for item in prange(items):
        n = item // chunks * BLOCK
        first = item % chunks * CHUNK
        last = min(M, first + CHUNK)
        m = first
        while m + 6 <= last:
            _float_tile_6(x, w, y, m, n, K, N)
            m += 6
        while m < last:
            _float_tile_1(x, w, y, m, n, K, N)
            m += 1
        if bias.size:
            _add_bias(y, bias, first, n, last - first, N)
    return y


def _int8_tile(ROWS):
    """A kernel for ROWS rows, each of high and low bytes, by one block of outputs."""

    SIZE = ROWS * PANELS

    @kernel
    def tile(q, starts, x_scales, w, w_scales, y, m, n, group, N):
        groups = x_scales.shape[1]
        K = groups * group
        total = zeros(SIZE)
        for g in range(groups):
            sums = start_rows(ROWS, DIGITS, PANELS, starts, m * groups + g, groups)
            at, row = n * K + g * group * PANEL, 2 * m * K + g * group
            for k in range(group // 4):
                sums = dot_rows(sums, PANELS, w, at + 64 * k, PANEL * K, q, row + 4 * k, K)
            scales = load_tile(PANELS, w_scales, n * groups + g * PANEL, PANEL * groups)
            total = scaled_rows(total, sums, scales, x_scales, m * groups + g, groups)
        store_rows(y, m * N + n, N, total, PANELS, N - n)

    return tile


_int8_tile_1, _int8_tile_3 = _int8_tile(1), _int8_tile(3)


@parallel_kernel
def matmul_int8(x, w, w_scales, bias, N):
    """x (M, K) float32, w packed 8-bit with its scales, bias (N,) or empty -> y (M, N) float32 ("w8a16")."""
    M, K = x.shape
    groups = w_scales.shape[1]
    group = 4 * w.shape[1] // groups
    q = np.empty((M, 2, groups * group), np.int8)
    starts = np.empty((M, groups), np.int32)
    x_scales = np.empty((M, groups), np.float32)
    y = np.empty((M, N), np.float32)
    if M == 1:
        quantize_row(x, 0, K, q, starts, x_scales, group)
    else:
        for m in prange(M):
            quantize_row(x, m, K, q, starts, x_scales, group)
    chunks = (M + CHUNK - 1) // CHUNK
    items = chunks * (w.shape[0] // PANELS)
    for item in prange(items):
        n = item // chunks * BLOCK
        first = item % chunks * CHUNK
        last = min(M, first + CHUNK)
        m = first
        while m + 3 <= last:
            _int8_tile_3(q, starts, x_scales, w, w_scales, y, m, n, group, N)
            m += 3
        while m < last:
            _int8_tile_1(q, starts, x_scales, w, w_scales, y, m, n, group, N)
            m += 1
        if bias.size:
            _add_bias(y, bias, first, n, last - first, N)
    return y
