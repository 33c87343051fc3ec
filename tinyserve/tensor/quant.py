"""Numbers in fewer bits: packing weights for the kernels, and quantizing activations on the fly.

Weights, 8 bits: each group of G inputs of one output shares a scale, w = scale · (byte - 128). Bytes are unsigned and
interleaved as the dot product eats them: (N/16 panels, K/4, 16 outputs, 4 inputs).
Activations, 16 bits ("a16"): x = scale · (256 · high + low), both signed bytes, again with a scale a group. Eight bits
would be faster and ruin small models: activations have outliers, weights have none.
"""

import numpy as np
from numba import prange

from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.simd import (
    LANES,
    absolute,
    as_float,
    fma,
    load,
    load_first,
    max_lane,
    maximum,
    round_to_int,
    splat,
    store_int8,
    sum_lanes,
    sum_lanes_int,
)  # fmt: skip

PANEL = 16  # outputs in a panel: one vector of sums
BLOCK = 64  # outputs that one register tile computes; weights are padded to a multiple of it
LARGEST_8 = 127
LARGEST_16 = 127 * 256


def padded(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


def pack_float(w: np.ndarray, bfloat16: bool) -> np.ndarray:
    """(N, K) float32 -> (N/16 panels, K, 16), N padded with zeros to a block; float32, or bfloat16 as uint16."""
    N, K = w.shape
    packed = np.zeros((padded(N, BLOCK) // PANEL, K, PANEL), np.uint16 if bfloat16 else np.float32)
    (_pack_bfloat16 if bfloat16 else _pack_float32)(np.ascontiguousarray(w), packed)
    return packed


@parallel_kernel
def _pack_float32(w, packed):
    for p in prange((w.shape[0] + PANEL - 1) // PANEL):
        for lane in range(min(PANEL, w.shape[0] - p * PANEL)):
            for k in range(w.shape[1]):
                packed[p, k, lane] = w[p * PANEL + lane, k]


@parallel_kernel
def _pack_bfloat16(w, packed):
    for p in prange((w.shape[0] + PANEL - 1) // PANEL):
        for lane in range(min(PANEL, w.shape[0] - p * PANEL)):
            bits = w[p * PANEL + lane].view(np.uint32)
            for k in range(w.shape[1]):
                rounded = bits[k] + np.uint32(0x7FFF) + ((bits[k] >> np.uint32(16)) & np.uint32(1))
                packed[p, k, lane] = np.uint16(rounded >> np.uint32(16))


def pack_int8(w: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) float32 -> bytes (N/16, K/4, 64) int8 and scales (N/16, K/group, 16) float32, padded with zeros."""
    N, K = w.shape
    panels, K_padded = padded(N, BLOCK) // PANEL, padded(K, group)
    # The bytes are unsigned; Numba's vectors do not care, and one array type means one compiled kernel.
    packed = np.full((panels, K_padded // 4, 4 * PANEL), -128, np.int8)
    scales = np.zeros((panels, K_padded // group, PANEL), np.float32)
    _pack_int8(np.ascontiguousarray(w), packed, scales, group)
    return packed, scales


@parallel_kernel
def _pack_int8(w, packed, scales, group):
    N, K = w.shape
    for p in prange((N + PANEL - 1) // PANEL):
        for lane in range(min(PANEL, N - p * PANEL)):
            row = w[p * PANEL + lane]
            for g in range(scales.shape[1]):
                first, last = g * group, min(K, (g + 1) * group)
                largest = np.float32(0.0)
                for k in range(first, last):
                    largest = max(largest, abs(row[k]))
                scale = largest / np.float32(LARGEST_8)
                inverse = np.float32(1.0) / scale if scale > 0 else np.float32(0.0)
                scales[p, g, lane] = scale
                for k in range(first, last):
                    byte = np.int32(np.rint(row[k] * inverse)) + 128
                    packed[p, k // 4, lane * 4 + k % 4] = np.int8(byte)  # wraps: the unsigned byte's bits


@kernel
def quantize_row(x, m, K, q, starts, scales, group):
    """Row m of x (M, K) float32 -> q[m] (2, K padded) int8, high bytes then low, with a scale and a start a group.

    starts[m, g] is -128 · sum of the group's integers: the accumulator's first value, which undoes that weights are
    stored as w + 128.
    """
    groups = scales.shape[1]
    K_padded = groups * group
    for g in range(groups):
        largest = damage = splat(np.float32(0.0))
        for k in range(g * group, (g + 1) * group, LANES):
            if k < K:
                v = load(x, m * K + k) if k + LANES <= K else load_first(x, m * K + k, K - k)
                largest = maximum(largest, absolute(v))
                damage = fma(v, splat(np.float32(0.0)), damage)
        # No integer says nan: a scale that is nan does, and comes out as the answer. Otherwise `damage` is zero.
        scale = max_lane(largest) / np.float32(LARGEST_16) + sum_lanes(damage)
        scales[m, g] = scale
        inverse = splat(np.float32(1.0) / scale if scale > np.float32(0.0) else np.float32(0.0))
        total = splat(np.int32(0))
        for k in range(g * group, (g + 1) * group, LANES):
            v = splat(np.float32(0.0))
            if k + LANES <= K:
                v = load(x, m * K + k)
            elif k < K:
                v = load_first(x, m * K + k, K - k)
            whole = round_to_int(v * inverse)
            high = (whole + splat(np.int32(128))) >> splat(np.int32(8))
            total = total + whole
            store_int8(q, 2 * m * K_padded + k, high)
            store_int8(q, (2 * m + 1) * K_padded + k, whole - (high << splat(np.int32(8))))
        starts[m, g] = -128 * sum_lanes_int(total)


@kernel
def take_rows_float(packed, ids, K):
    """Rows `ids` (tokens,) of a packed float matrix -> (tokens, K) float32: the embedding of each token."""
    rows = np.empty((ids.size, K), np.float32)
    for i in range(ids.size):
        for k in range(K):
            rows[i, k] = as_float(packed[ids[i] // PANEL, k, ids[i] % PANEL])
    return rows


@kernel
def take_rows_int8(packed, scales, ids, K):
    """Rows `ids` (tokens,) of a packed 8-bit matrix -> (tokens, K) float32."""
    rows = np.empty((ids.size, K), np.float32)
    group = 4 * packed.shape[1] // scales.shape[1]
    for i in range(ids.size):
        panel, lane = ids[i] // PANEL, ids[i] % PANEL
        for k in range(K):
            byte = np.int32(np.uint8(packed[panel, k // 4, lane * 4 + k % 4])) - 128
            rows[i, k] = np.float32(byte) * scales[panel, k // group, lane]
    return rows
