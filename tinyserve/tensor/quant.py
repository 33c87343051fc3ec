"""Numbers in fewer bits: packing weights for the kernels, and quantizing activations on the fly.

Packed weights are a stream: what a product reads, in the order in which it reads it, from end to end. A pair of panels
is 32 outputs; its inputs come group after group, and a group of G inputs of one output shares a scale:

    pair 0    group 0    scales     2 · 16 float16
                         minimums   2 · 16 float16, where there are any
                         weights    64 bytes of one panel, 64 of the other, and so on: 4 or 8 inputs of 16 outputs
              group 1    ...
    pair 1    ...

Weights, 8 bits: w = scale · (byte - 128), the bytes of four inputs of an output side by side, as the dot product eats
them. Weights, 4 bits: w = scale · (nibble - 8), or scale · nibble + minimum where there are minimums; two neighbouring
fours of inputs are in a byte's halves. Floats have no groups: a pair is K · 32 of them, 16 of each panel in turn.

Activations, 8 or 16 bits: x = scale · integer, again with a scale a group. Eight bits are faster and ruin small
models: activations have outliers, weights have none.
"""

from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from tinyserve.tensor import dot_product
from tinyserve.tensor._jit import kernel
from tinyserve.tensor.arena import aligned
from tinyserve.tensor.program import constant, empty, instruction
from tinyserve.tensor.simd import (
    LANES,
    as_float,
    as_kept,
    emit_address,
    float_of_bits,
    fma,
    i32x16,
    larger_int,
    load,
    load_first,
    magnitude_bits,
    max_lane,
    max_lane_int,
    maximum,
    minimum,
    round_to_int,
    splat,
    sum_lanes,
    sum_lanes_int,
    to_float,
)  # fmt: skip
from tinyserve.tensor.thread_pool import next_items, own_items
from tinyserve.tensor.tiles import inputs_per_load

Array = np.ndarray

PANEL = 16  # outputs in a panel: one vector of sums
PAIR = 2 * PANEL  # outputs whose weights are one stretch of the stream
BLOCK = 64  # outputs that weights are padded to a multiple of: a work item of the matrix product
LARGEST_8 = 127
LARGEST_16 = 127 * 256
INFINITY = 0x7F800000  # its bits in float32
ZERO_8, ZERO_4 = 128, 8  # what is added to weights, to keep them unsigned


@constant
class IntegerWeights(NamedTuple):
    """A matrix of integers, padded with zeros to whole blocks of outputs and groups of inputs."""

    stream: Array  # (pairs, groups, bytes) int8: a byte a weight; uint8: two weights a byte
    group: int  # inputs that share a scale
    has_minimums: int

    @classmethod
    def of(cls, stream: Array) -> "IntegerWeights":
        """What a stream holds, which its type and shape tell; raises ValueError where it is none."""
        for group in (32, 64):
            for has_minimums in (0, 1):
                weights = cls(stream, group, has_minimums)
                if stream.ndim == 3 and stream.dtype in _INPUTS and stream.shape[2] == weights.group_bytes:
                    return weights
        raise ValueError(f"{stream.dtype} {list(stream.shape)} is no stream of weights")

    @classmethod
    def empty(cls, shape: tuple[int, int], bits: int, group: int, has_minimums: bool = False) -> "IntegerWeights":
        """Room for an (N, K) matrix, with scales of zero, and weights that nobody has written."""
        dtype = np.dtype(np.int8 if bits == 8 else np.uint8)
        size = cls(np.empty((0, 0, 0), dtype), group, int(has_minimums)).group_bytes
        stream = aligned((padded(shape[0], BLOCK) // PAIR, padded(shape[1], group) // group, size), dtype)
        weights = cls(stream, group, int(has_minimums))
        weights.scales[:] = 0
        return weights

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return 8 if self.stream.dtype == np.int8 else 4

    @property
    def _header(self) -> int:
        return (1 + self.has_minimums) * 2 * PAIR

    @property
    def group_bytes(self) -> int:
        """Bytes of a group of inputs of a pair."""
        return self._header + self.group * PAIR * self.bits // 8

    @property
    def scales(self) -> Array:
        """A view of the scales (pairs, groups, 2, 16) float16 kept as int16."""
        return self._halves(0)

    @property
    def minimums(self) -> Array:
        """A view of the minimums, as of the scales, with no pairs where there are none."""
        return self._halves(PAIR) if self.has_minimums else self._halves(0)[:0]

    @property
    def integers(self) -> Array:
        """A view of the weights (pairs, groups, loads, 2, 64)."""
        bytes_ = self.stream[:, :, self._header :]
        return bytes_.reshape(*bytes_.shape[:2], bytes_.shape[2] // (4 * PAIR), 2, 4 * PANEL)

    def _halves(self, start: int) -> Array:
        halves = self.stream.view(np.int16)[:, :, start : start + PAIR]
        return halves.reshape(*halves.shape[:2], 2, PANEL)

    def is_finite(self) -> bool:
        """Whether all scales and minimums are numbers."""
        return all(np.isfinite(halves.view(np.float16)).all() for halves in (self.scales, self.minimums))

    def holds(self, shape: tuple[int, int]) -> bool:
        """Whether this is an (N, K) matrix as the kernels read it."""
        pairs, groups, _ = self.stream.shape
        return (pairs, groups * self.group) == (padded(shape[0], BLOCK) // PAIR, padded(shape[1], self.group))


_INPUTS = {np.dtype(np.int8): 4, np.dtype(np.uint8): 8}  # of an output, in the 64 bytes of a panel


def padded(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple


def pack_float(w: Array, bfloat16: bool) -> Array:
    """(N, K) float32 -> (N/32 pairs, K, 32), N padded with zeros to a block; float32, or bfloat16 as uint16."""
    N, K = w.shape
    packed = aligned((padded(N, BLOCK) // PAIR, K, PAIR), np.uint16 if bfloat16 else np.float32, np.zeros)
    _pack_float(np.ascontiguousarray(w), packed)
    return packed


@instruction
def _pack_float(team, w, packed):
    first, last = next_items(team, packed.shape[0])
    while first < last:
        for pair in range(first, last):
            for lane in range(min(PAIR, w.shape[0] - pair * PAIR)):
                for k in range(w.shape[1]):
                    packed[pair, k, lane] = as_kept(packed, w[pair * PAIR + lane, k])
        first, last = next_items(team, packed.shape[0])


def pack_bytes(w: Array, group: int) -> IntegerWeights:
    """(N, K) float32 -> 8 bits, a group's largest weight at most 127 steps."""
    packed = IntegerWeights.empty(w.shape, 8, group)
    largest = np.zeros(packed.scales.shape, np.float32)
    w = np.ascontiguousarray(w)
    _largest_of_groups(w, largest, group)
    packed.scales[:] = half_at_least(largest / np.float32(LARGEST_8))
    _pack_bytes(w, np.ascontiguousarray(packed.scales).view(np.float16).astype(np.float32), packed)
    return packed


def half_at_least(x: Array) -> Array:
    """The smallest float16 numbers that are not below x, kept as int16: a group's largest weight must fit its scale."""
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    return np.where(half.astype(np.float32) < x, np.nextafter(half, np.float16(np.inf)), half).view(np.int16)


@instruction
def _largest_of_groups(team, w, largest, group):
    N, K = w.shape
    first, last = own_items(team, N)
    for n in range(first, last):
        row = w[n]
        for g in range(largest.shape[1]):
            most = np.float32(0.0)
            for k in range(g * group, min(K, (g + 1) * group)):
                most = max(most, abs(row[k]))
            largest[n // PAIR, g, n % PAIR // PANEL, n % PANEL] = most


@instruction
def _pack_bytes(team, w, scales, packed):
    first, last = next_items(team, packed.stream.shape[0])
    while first < last:
        for pair in range(first, last):
            _pack_pair_of_bytes(w, scales, packed, pair)
        first, last = next_items(team, packed.stream.shape[0])


@kernel
def _pack_pair_of_bytes(w, scales, packed, pair):
    N, K = w.shape
    for lane in range(PAIR):
        n = pair * PAIR + lane
        for g in range(scales.shape[1]):
            scale = scales[pair, g, lane // PANEL, lane % PANEL]
            inverse = np.float32(1.0) / scale if scale > 0 else np.float32(0.0)
            at = 2 * PAIR + lane // PANEL * 4 * PANEL + lane % PANEL * 4
            for i in range(packed.group):
                k = g * packed.group + i
                whole = np.int32(np.rint(w[n, k] * inverse)) if n < N and k < K else np.int32(0)
                # Wraps: the unsigned byte's bits. Numba's vectors do not care, and int8 says "a byte a weight".
                packed.stream[pair, g, at + i // 4 * 4 * PAIR + i % 4] = np.int8(whole + ZERO_8)


def pack_nibbles(w: Array, group: int) -> IntegerWeights:
    """(N, K) float32 -> 4 bits.

    A group's scale makes its largest weight -8 or nearly so: of a few candidates, the one with the least squared error.
    """
    packed = IntegerWeights.empty(w.shape, 4, group)
    scales = np.zeros(packed.scales.shape, np.float32)
    w = np.ascontiguousarray(w)
    _scales_of_nibbles(w, scales, group)
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    packed.scales[:] = half.view(np.int16)
    _pack_nibbles(w, half.astype(np.float32), packed)
    return packed


CANDIDATES = 9  # of scales tried for a group of 4-bit weights


@instruction
def _scales_of_nibbles(team, w, scales, group):
    first, last = own_items(team, w.shape[0])
    for n in range(first, last):
        for g in range(scales.shape[1]):
            scale = _scale_of_nibbles(w, n, g * group, min(w.shape[1], (g + 1) * group))
            scales[n // PAIR, g, n % PAIR // PANEL, n % PANEL] = scale


@kernel
def _scale_of_nibbles(w, n, first, last):
    """The best scale found for weights first..last of row n."""
    K = w.shape[1]
    at = n * K
    zero, lowest, highest = splat(np.float32(0.0)), splat(np.float32(-8.0)), splat(np.float32(7.0))
    positive = negative = zero
    for k in range(first, last, LANES):
        v = load_first(w, at + k, K - k)
        positive, negative = maximum(positive, v), maximum(negative, zero - v)
    most, least = max_lane(positive), -max_lane(negative)
    extreme = most if most >= -least else least
    best, scale = np.float32(-1.0), np.float32(0.0)
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
            scale = wq / qq
    return scale


@kernel
def _nibble(w, n, k, inverse):
    """Weight (n, k) as an integer of 4 bits; zero past the last output or input."""
    if n >= w.shape[0] or k >= w.shape[1]:
        return ZERO_4
    return np.int32(min(np.float32(7.0), max(np.float32(-8.0), np.rint(w[n, k] * inverse)))) + ZERO_4


@instruction
def _pack_nibbles(team, w, scales, packed):
    first, last = next_items(team, packed.stream.shape[0])
    while first < last:
        for pair in range(first, last):
            _pack_pair_of_nibbles(w, scales, packed, pair)
        first, last = next_items(team, packed.stream.shape[0])


@kernel
def _pack_pair_of_nibbles(w, scales, packed, pair):
    for lane in range(PAIR):
        n = pair * PAIR + lane
        for g in range(scales.shape[1]):
            scale = scales[pair, g, lane // PANEL, lane % PANEL]
            inverse = np.float32(1.0) / scale if scale != 0 else np.float32(0.0)
            at = 2 * PAIR + lane // PANEL * 4 * PANEL + lane % PANEL * 4
            for i in range(0, packed.group, 8):
                k = g * packed.group + i
                for j in range(4):
                    low, high = _nibble(w, n, k + j, inverse), _nibble(w, n, k + 4 + j, inverse)
                    packed.stream[pair, g, at + i // 8 * 4 * PAIR + j] = np.uint8(low | high << 4)


# --- activations --------------------------------------------------------------------------------------------------


@constant
class RoundingNumbers(NamedTuple):
    """The numbers of a `Rounding`, which kernels are told; the type they see by the array that they fill."""

    largest: np.float32  # that a group's largest number becomes
    zero: int  # what has been added to the weights, to keep them unsigned


class Rounding(NamedTuple):
    """How activations are rounded to integers beside some weights."""

    dtype: type  # how the integers are kept: int8 or int16
    numbers: RoundingNumbers

    @classmethod
    def to(cls, activation_bits: int, weights: IntegerWeights) -> "Rounding":
        """Activations of 16 or 8 bits."""
        largest = np.float32(LARGEST_16 if activation_bits == 16 else LARGEST_8)
        zeros = {8: 0 if dot_product.SIGNED else ZERO_8, 4: 0 if weights.has_minimums else ZERO_4}
        numbers = RoundingNumbers(largest, zeros[weights.bits])
        return cls(activation_dtype(activation_bits, weights.bits), numbers)


def activation_dtype(activation_bits: int, weight_bits: int) -> type:
    """How activations of this many bits are kept beside such weights."""
    as_bytes = activation_bits == 8 and not (dot_product.PAIRS and weight_bits == 8)
    return np.int8 if as_bytes else np.int16


@intrinsic
def store_activations(typing_context, q, index, whole):
    """16 integers to a flat index of q, in the storage that its type means."""

    def codegen(context, builder, sig, args):
        kept = dot_product.emit_activations(builder, q, args[2])
        builder.store(kept, emit_address(context, builder, q, args[0], args[1], kept.type), align=1)
        return context.get_dummy_value()

    return types.void(q, types.intp, i32x16), codegen


@kernel
def _load_part(x, at, left):
    """16 neighbours, of which only the first `left` exist when it is less: the others are zero."""
    return load(x, at) if left >= LANES else load_first(x, at, left)


@kernel
def quantize_row(x, m, quantized, row, rounding):
    """Row m of x (M, K) float32 -> a row of integers up to `largest`, with a scale, a start and a sum a group.

    sums are what a group's numbers add up to; starts are -zero · the same in integers: the accumulator's first value,
    which undoes that weights are stored as w + zero.
    """
    K, groups = x.shape[1], quantized.scales.shape[1]
    K_padded = quantized.q.shape[1]
    group = K_padded // groups
    for g in range(groups):
        most = splat(np.int32(0))
        for k in range(g * group, min(K, (g + 1) * group), LANES):
            most = larger_int(most, magnitude_bits(_load_part(x, m * K + k, K - k)))
        bits = max_lane_int(most)
        # No integer says nan: a scale that is nan does, and comes out as the answer.
        scale = float_of_bits(bits) / rounding.largest if bits < INFINITY else np.float32(np.nan)
        quantized.scales[row, g] = scale
        inverse = splat(np.float32(1.0) / scale if scale > np.float32(0.0) else np.float32(0.0))
        total = splat(np.int32(0))
        for k in range(g * group, (g + 1) * group, LANES):
            v = splat(np.float32(0.0))
            if k < K:
                v = _load_part(x, m * K + k, K - k)
            whole = round_to_int(v * inverse)
            total = total + whole
            store_activations(quantized.q, row * K_padded + k, whole)
        sum_of_group = sum_lanes_int(total)
        quantized.starts[row, g] = -rounding.zero * sum_of_group
        quantized.sums[row, g] = np.float32(sum_of_group) * scale


# --- rows of packed weights: an embedding's ---------------------------------------------------------------------------


def take_rows_float(packed: Array, ids: Array, K: int) -> Array:
    """Rows `ids` (tokens,) of a packed float matrix -> (tokens, K) float32: the embedding of each token."""
    rows = empty((len(ids), K))
    _take_rows_float(packed, ids, rows)
    return rows


@instruction
def _take_rows_float(team, packed, ids, rows):
    first, last = own_items(team, ids.size)
    for i in range(first, last):
        for k in range(rows.shape[1]):
            rows[i, k] = as_float(packed[ids[i] // PAIR, k, ids[i] % PAIR])


def take_rows_integer(packed: IntegerWeights, ids: Array, K: int) -> Array:
    """Rows `ids` (tokens,) of a packed matrix of integers -> (tokens, K) float32."""
    rows = empty((len(ids), K))
    _take_rows_integer(packed, ids, rows)
    return rows


@instruction
def _take_rows_integer(team, packed, ids, rows):
    first, last = own_items(team, ids.size)
    for i in range(first, last):
        _take_row(packed, ids[i], rows, i)


@kernel
def _take_row(packed, n, rows, i):
    stream, group, inputs = packed.stream, packed.group, inputs_per_load(packed.stream)
    pair, panel, lane = n // PAIR, n % PAIR // PANEL, n % PANEL
    header, zero = (1 + packed.has_minimums) * 2 * PAIR, ZERO_8 if inputs == 4 else ZERO_4
    for g in range(stream.shape[1]):
        of_pair, first, offset = stream[pair, g], g * group, np.float32(0.0)
        scale = _half(of_pair, 2 * (panel * PANEL + lane))
        if packed.has_minimums:
            offset, zero = _half(of_pair, 2 * PAIR + 2 * (panel * PANEL + lane)), 0
        for j in range(min(group, rows.shape[1] - first)):
            byte = np.int32(np.uint8(of_pair[header + (j // inputs * 2 + panel) * 4 * PANEL + lane * 4 + j % 4]))
            whole = byte if inputs == 4 else (byte >> (j // 4 % 2 * 4)) & 15
            rows[i, first + j] = np.float32(whole - zero) * scale + offset


@kernel
def _half(of_pair, at):
    """The float16 at a byte of a pair's group."""
    return as_float(np.int16(np.int64(np.uint8(of_pair[at])) | np.int64(np.uint8(of_pair[at + 1])) << 8))
