"""Numbers in fewer bits: packing weights for the kernels, and quantizing activations on the fly.

Each group of G inputs of one output shares a scale, kept as float16.
Weights, 8 bits: w = scale · (byte - 128), bytes interleaved as the dot product eats them: (N/16 panels, K/4, 16
outputs, 4 inputs). Weights, 4 bits: w = scale · (nibble - 8), or scale · nibble + minimum where there are minimums;
two neighbouring fours of inputs are in a byte's halves.
Activations, 8 or 16 bits: x = scale · integer, again with a scale a group. Eight bits are faster and ruin small
models: activations have outliers, weights have none.
"""

from typing import NamedTuple

import numpy as np
from numba import prange, types
from numba.extending import intrinsic

from tinyserve.tensor import dot_product
from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.simd import (
    LANES,
    absolute,
    as_float,
    emit_address,
    fma,
    i32x16,
    load_first,
    max_lane,
    maximum,
    minimum,
    round_to_int,
    splat,
    sum_lanes,
    sum_lanes_int,
    to_float,
)  # fmt: skip
from tinyserve.tensor.tiles import inputs_per_load

PANEL = 16  # outputs in a panel: one vector of sums
BLOCK = 64  # outputs that weights are padded to a multiple of: a work item of the matrix product
NO_MINIMUMS = np.empty((0, 0, 0), np.int16)
LARGEST_8 = 127
LARGEST_16 = 127 * 256
ZERO_8, ZERO_4 = 128, 8  # what is added to weights, to keep them unsigned


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


class Packed(NamedTuple):
    """A matrix of integers, padded with zeros to whole blocks of outputs and groups of inputs."""

    integers: np.ndarray  # 8 bits: (N/16, K/4, 64) int8; 4 bits: (N/16, K/8, 64) uint8
    scales: np.ndarray  # (N/16, K/group, 16) float16 kept as int16
    minimums: np.ndarray = NO_MINIMUMS  # the same, or empty

    def is_finite(self) -> bool:
        """Whether all scales and minimums are numbers."""
        return all(np.isfinite(halves.view(np.float16)).all() for halves in (self.scales, self.minimums))

    def holds(self, shape: tuple[int, int]) -> bool:
        """Whether these are arrays of an (N, K) matrix as the kernels read it."""
        inputs = {np.dtype(np.int8): 4, np.dtype(np.uint8): 8}.get(self.integers.dtype)
        if inputs is None or self.integers.ndim != 3 or self.scales.ndim != 3 or self.scales.dtype != np.int16:
            return False
        panels, loads, width = self.integers.shape
        groups = self.scales.shape[1]
        return (
            (panels, width) == (padded(shape[0], BLOCK) // PANEL, 4 * PANEL)
            and self.scales.shape == (panels, groups, PANEL)
            and self.minimums.shape in ((0, 0, 0), self.scales.shape)
            and any(padded(shape[1], group) == loads * inputs == groups * group for group in (32, 64))
        )


def pack_bytes(w: np.ndarray, group: int) -> Packed:
    """(N, K) float32 -> 8 bits, a group's largest weight at most 127 steps."""
    N, K = w.shape
    panels, K_padded = padded(N, BLOCK) // PANEL, padded(K, group)
    # The bytes are unsigned; Numba's vectors do not care, and int8 says "a byte a weight" where uint8 says two.
    packed = np.full((panels, K_padded // 4, 4 * PANEL), -ZERO_8, np.int8)
    largest = np.zeros((panels, K_padded // group, PANEL), np.float32)
    w = np.ascontiguousarray(w)
    _largest_of_groups(w, largest, group)
    scales = half_at_least(largest / np.float32(LARGEST_8))
    _pack_bytes(w, packed, scales.view(np.float16).astype(np.float32), group)
    return Packed(packed, scales)


def half_at_least(x: np.ndarray) -> np.ndarray:
    """The smallest float16 numbers that are not below x, kept as int16: a group's largest weight must fit its scale."""
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    return np.where(half.astype(np.float32) < x, np.nextafter(half, np.float16(np.inf)), half).view(np.int16)


@kernel
def _largest_of_panel(w, largest, group, p):
    """One panel."""
    N, K = w.shape
    for lane in range(min(PANEL, N - p * PANEL)):
        row = w[p * PANEL + lane]
        for g in range(largest.shape[1]):
            most = np.float32(0.0)
            for k in range(g * group, min(K, (g + 1) * group)):
                most = max(most, abs(row[k]))
            largest[p, g, lane] = most


@parallel_kernel
def _largest_of_groups(w, largest, group):
    for p in prange((w.shape[0] + PANEL - 1) // PANEL):
        _largest_of_panel(w, largest, group, np.int64(p))


@kernel
def _pack_panel_of_bytes(w, packed, scales, group, p):
    """One panel."""
    N, K = w.shape
    for lane in range(min(PANEL, N - p * PANEL)):
        row = w[p * PANEL + lane]
        for g in range(scales.shape[1]):
            scale = scales[p, g, lane]
            inverse = np.float32(1.0) / scale if scale > 0 else np.float32(0.0)
            for k in range(g * group, min(K, (g + 1) * group)):
                byte = np.int32(np.rint(row[k] * inverse)) + ZERO_8
                packed[p, k // 4, lane * 4 + k % 4] = np.int8(byte)  # wraps: the unsigned byte's bits


@parallel_kernel
def _pack_bytes(w, packed, scales, group):
    for p in prange((w.shape[0] + PANEL - 1) // PANEL):
        _pack_panel_of_bytes(w, packed, scales, group, np.int64(p))


def pack_nibbles(w: np.ndarray, group: int) -> Packed:
    """(N, K) float32 -> 4 bits.

    A group's scale makes its largest weight -8 or nearly so: of a few candidates, the one with the least squared error.
    """
    N, K = w.shape
    panels, K_padded = padded(N, BLOCK) // PANEL, padded(K, group)
    packed = np.full((panels, K_padded // 8, 4 * PANEL), ZERO_4 * 17, np.uint8)
    scales = np.zeros((panels, K_padded // group, PANEL), np.float32)
    w = np.ascontiguousarray(w)
    _scales_of_nibbles(w, scales, group)
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    _pack_nibbles(w, packed, half.astype(np.float32), group)
    return Packed(packed, half.view(np.int16))


CANDIDATES = 9  # of scales tried for a group of 4-bit weights


@kernel
def _scales_of_panel(w, scales, group, p):
    """One panel."""
    N, K = w.shape
    zero, lowest, highest = splat(np.float32(0.0)), splat(np.float32(-8.0)), splat(np.float32(7.0))
    for lane in range(min(PANEL, N - p * PANEL)):
        at = (p * PANEL + lane) * K
        for g in range(scales.shape[1]):
            first, last = g * group, min(K, (g + 1) * group)
            positive = negative = zero
            for k in range(first, last, LANES):
                v = load_first(w, at + k, K - k)
                positive, negative = maximum(positive, v), maximum(negative, zero - v)
            most, least = max_lane(positive), -max_lane(negative)
            extreme = most if most >= -least else least
            best = np.float32(-1.0)
            for c in range(CANDIDATES):
                step = extreme / np.float32(-8.4 + 0.2 * c)  # from -8.4, which clips, to -6.8
                inverse = splat(np.float32(1.0) / step if step != 0 else np.float32(0.0))
                products = squares = zero
                for k in range(first, last, LANES):
                    v = load_first(w, at + k, K - k)
                    q = to_float(round_to_int(minimum(highest, maximum(lowest, v * inverse))))
                    products, squares = fma(v, q, products), fma(q, q, squares)
                wq, qq = sum_lanes(products), sum_lanes(squares)
                # With these integers the best scale is wq / qq, and this is how much of Σw² it explains.
                if qq > 0 and wq * wq > best * qq:
                    best = wq * wq / qq
                    scales[p, g, lane] = wq / qq


@parallel_kernel
def _scales_of_nibbles(w, scales, group):
    for p in prange((w.shape[0] + PANEL - 1) // PANEL):
        _scales_of_panel(w, scales, group, np.int64(p))


@kernel
def _nibble(w, n, k, inverse):
    """Weight (n, k) as an integer of 4 bits; zero past the last input."""
    if k >= w.shape[1]:
        return ZERO_4
    return np.int32(min(np.float32(7.0), max(np.float32(-8.0), np.rint(w[n, k] * inverse)))) + ZERO_4


@kernel
def _pack_panel_of_nibbles(w, packed, scales, group, p):
    """One panel."""
    for lane in range(min(PANEL, w.shape[0] - p * PANEL)):
        n = p * PANEL + lane
        for g in range(scales.shape[1]):
            scale = scales[p, g, lane]
            inverse = np.float32(1.0) / scale if scale != 0 else np.float32(0.0)
            for k in range(g * group, (g + 1) * group, 8):
                for j in range(4):
                    low, high = _nibble(w, n, k + j, inverse), _nibble(w, n, k + 4 + j, inverse)
                    packed[p, k // 8, lane * 4 + j] = np.uint8(low | high << 4)


@parallel_kernel
def _pack_nibbles(w, packed, scales, group):
    for p in prange((w.shape[0] + PANEL - 1) // PANEL):
        _pack_panel_of_nibbles(w, packed, scales, group, np.int64(p))


# --- activations --------------------------------------------------------------------------------------------------


def activation_kind(activation_bits: int, weight_bits: int) -> np.ndarray:
    """An empty array whose dtype tells the kernels how activations of this many bits are kept beside such weights."""
    as_bytes = activation_bits == 8 and not (dot_product.PAIRS and weight_bits == 8)
    kind = np.empty(0, np.int8 if as_bytes else np.int16)
    kind.flags.writeable = False
    return kind


@intrinsic
def store_activations(typing_context, q, index, whole):
    """16 integers to a flat index of q, in the storage that its type means."""

    def codegen(context, builder, sig, args):
        kept = dot_product.emit_activations(builder, q, args[2])
        builder.store(kept, emit_address(context, builder, q, args[0], args[1], kept.type), align=1)
        return context.get_dummy_value()

    return types.void(q, types.intp, i32x16), codegen


@kernel
def quantize_row(x, m, q, starts, scales, sums, group, largest, zero):
    """Row m of x (M, K) float32 -> q[m] (K padded) integers up to `largest`, with a scale, a start and a sum a group.

    sums[m, g] is what the group's numbers add up to; starts[m, g] is -zero · the same in integers: the accumulator's
    first value, which undoes that weights are stored as w + zero.
    """
    K, groups = x.shape[1], scales.shape[1]
    K_padded = groups * group
    for g in range(groups):
        most = damage = splat(np.float32(0.0))
        for k in range(g * group, (g + 1) * group, LANES):
            if k < K:
                v = load_first(x, m * K + k, K - k)
                most = maximum(most, absolute(v))
                damage = fma(v, splat(np.float32(0.0)), damage)
        # No integer says nan: a scale that is nan does, and comes out as the answer. Otherwise `damage` is zero.
        scale = max_lane(most) / largest + sum_lanes(damage)
        scales[m, g] = scale
        inverse = splat(np.float32(1.0) / scale if scale > np.float32(0.0) else np.float32(0.0))
        total = splat(np.int32(0))
        for k in range(g * group, (g + 1) * group, LANES):
            v = splat(np.float32(0.0))
            if k < K:
                v = load_first(x, m * K + k, K - k)
            whole = round_to_int(v * inverse)
            total = total + whole
            store_activations(q, m * K_padded + k, whole)
        sum_of_group = sum_lanes_int(total)
        starts[m, g] = -zero * sum_of_group
        sums[m, g] = np.float32(sum_of_group) * scale


# --- rows of packed weights: an embedding's ---------------------------------------------------------------------------


@kernel
def take_rows_float(packed, ids, K):
    """Rows `ids` (tokens,) of a packed float matrix -> (tokens, K) float32: the embedding of each token."""
    rows = np.empty((ids.size, K), np.float32)
    for i in range(ids.size):
        for k in range(K):
            rows[i, k] = as_float(packed[ids[i] // PANEL, k, ids[i] % PANEL])
    return rows


@kernel
def take_rows_integer(packed, scales, minimums, ids, K):
    """Rows `ids` (tokens,) of a packed matrix of integers -> (tokens, K) float32."""
    rows = np.empty((ids.size, K), np.float32)
    inputs = inputs_per_load(packed)
    group = inputs * packed.shape[1] // scales.shape[1]
    for i in range(ids.size):
        panel, lane = ids[i] // PANEL, ids[i] % PANEL
        for k in range(K):
            byte = np.int32(np.uint8(packed[panel, k // inputs, lane * 4 + k % 4]))
            whole = byte if inputs == 4 else (byte >> (k // 4 % 2 * 4)) & 15
            scale = as_float(scales[panel, k // group, lane])
            if minimums.size:
                rows[i, k] = np.float32(whole) * scale + as_float(minimums[panel, k // group, lane])
            else:
                rows[i, k] = np.float32(whole - (ZERO_8 if inputs == 4 else ZERO_4)) * scale
    return rows
