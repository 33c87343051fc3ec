"""The integer dot product of each processor, chosen once, and how activations are laid out for it.

Knows instructions and bytes, not matrices. There are two kinds:

    bytes    one instruction adds four products of an unsigned and a signed byte to each of its 32-bit sums
             (AVX512-VNNI, AVX-VNNI, NEON's sdot; "plain" does the same by shifts). An activation of 16 bits is two
             digits, a high and a low byte, with sums of their own.
    pairs    AVX2's pmaddwd adds two products of 16-bit numbers. Its pmaddubsw takes bytes and saturates, which is no
             danger only beside weights of 4 bits: there it adds 32 inputs up in 16-bit sums. So on AVX2 activations
             of 16 bits cost what those of 8 bits do beside weights of 8 bits, and twice as much beside 4.

An array's type says what is in it: weights are int8 (a byte each) or uint8 (two nibbles a byte), activations int8 or
int16, whose storage is 8 bytes for each four inputs:
    bytes    high digits of the four, then their low digits
    pairs    inputs 0, 2, 1, 3 as int16: with weights, evens and odds fall out of a mask and a shift
"""

import os

from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import types

from tinyserve.tensor import _jit
from tinyserve.tensor.simd import I8, I16, I32, emit_call, emit_constant, i8x64, i32x16

PATHS = ("avx512-vnni", "avx-vnni", "neon", "avx2", "plain")
_NEEDS = {
    "avx512-vnni": ("avx512f", "avx512bw", "avx512vnni"),
    "avx-vnni": ("avxvnni",),
    "neon": ("dotprod",),
    "avx2": ("avx2",),
    "plain": (),
}
VARIABLE = "TINYSERVE_DOT_PRODUCT"


def choose() -> str:
    """The fastest path that this processor has and that ran when it was probed; TINYSERVE_DOT_PRODUCT overrules."""
    if (forced := os.environ.get(VARIABLE)) in PATHS:
        return str(forced)
    candidates = [path for path in PATHS if _jit.has_feature(*_NEEDS[path])]
    return next(path for path in candidates if path == "plain" or _jit.runs(f"dot-{path}", _PROBE, {VARIABLE: path}))


# What a process of its own runs, once a processor: a path that is an illegal instruction ends that process, not ours.
_PROBE = "from tinyserve.tensor import probe; probe.check()"

PATH = choose()
PAIRS = PATH == "avx2"
# The sums of four products are unsigned · signed, and start at -128 · Σx; NEON's are signed, and start at zero.
SIGNED = PATH == "neon"


def sums_per_row(activations: types.Array) -> int:
    """How many 32-bit sums a row has for each output: one, or one a digit."""
    return 2 if activations.dtype == types.int16 and not PAIRS else 1


def sums_in_16_bits(weights: types.Array, activations: types.Array) -> bool:
    """Whether 32 inputs are first added up in 16-bit sums."""
    return PAIRS and weights.dtype == types.uint8 and activations.dtype == types.int8


def emit_unpack(builder, weights: types.Array, loaded) -> list:
    """64 loaded bytes of weights -> the dot products' operands, four inputs of 16 outputs each."""
    if weights.dtype == types.int8:
        return [loaded]
    low = builder.and_(loaded, emit_constant(15, i8x64))
    words = builder.lshr(builder.bitcast(loaded, i32x16.llvm), emit_constant(4, i32x16))
    return [low, builder.and_(builder.bitcast(words, i8x64.llvm), emit_constant(15, i8x64))]


def emit_widen(builder, weights: types.Array, activations: types.Array, operand):
    """The part of a dot product that depends on the weights alone: done once for all rows."""
    if not PAIRS:
        is_byte = SIGNED and weights.dtype == types.int8
        return builder.xor(operand, emit_constant(-128, i8x64)) if is_byte else operand
    halves = _halves(builder, operand)
    if sums_in_16_bits(weights, activations):
        return halves
    words = [builder.bitcast(half, ir.VectorType(I16, 16)) for half in halves]
    mask, eight = (ir.Constant(ir.VectorType(I16, 16), [n] * 16) for n in (255, 8))
    return [(builder.and_(word, mask), builder.lshr(word, eight)) for word in words]


def emit_dot(builder, weights: types.Array, activations: types.Array, totals: list, widened, inputs: list) -> list:
    """A row's sums with four inputs more: inputs are one splat i32 a digit, or one a pair."""
    if PAIRS and sums_in_16_bits(weights, activations):
        four = ir.VectorType(I8, 32)
        parts = [
            emit_call(
                builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), half, _narrow(builder, inputs[0], four)
            )
            for half in widened
        ]
        return [builder.add(totals[0], _join(builder, *parts))]
    if PAIRS:
        pair = ir.VectorType(I16, 16)
        even, odd = (_narrow(builder, x, pair) for x in inputs)
        parts = []
        for low, high in widened:
            parts.append(builder.add(_pmaddwd(builder, low, even), _pmaddwd(builder, high, odd)))
        return [builder.add(totals[0], _join(builder, *parts))]
    digits = [builder.bitcast(x, i8x64.llvm) for x in inputs]
    return [_emit_dot_4(builder, total, widened, digit) for total, digit in zip(totals, digits, strict=True)]


def emit_end(builder, totals, sums):
    """32-bit totals with the 16-bit sums of 32 inputs, two for each output."""
    ones = ir.Constant(ir.VectorType(I16, 16), [1] * 16)
    halves = [_pmaddwd(builder, half, ones) for half in _halves(builder, sums)]
    return builder.add(totals, _join(builder, *halves))


def emit_activations(builder, activations: types.Array, whole):
    """16 integers -> their storage: 16 or 32 bytes."""
    if activations.dtype == types.int8:
        return builder.trunc(whole, ir.VectorType(I8, 16))
    if PAIRS:
        return _shuffle(
            builder,
            builder.trunc(whole, ir.VectorType(I16, 16)),
            None,
            [4 * i + j for i in range(4) for j in (0, 2, 1, 3)],
        )
    high = builder.ashr(builder.add(whole, emit_constant(128, i32x16)), emit_constant(8, i32x16))
    low = builder.sub(whole, builder.shl(high, emit_constant(8, i32x16)))
    order = [digit + 4 * i + j for i in range(4) for digit in (0, 16) for j in range(4)]
    high, low = (builder.trunc(digit, ir.VectorType(I8, 16)) for digit in (high, low))
    return _shuffle(builder, high, low, order)


def _emit_dot_4(builder, total, unsigned, signed):
    """total[i] + sum over j < 4 of unsigned[4i+j] · signed[4i+j], exactly, in 32-bit integers."""
    if PATH == "avx512-vnni":
        if llvm_version_info < (22,):  # which took the bytes as the integers that they are packed in
            unsigned, signed = builder.bitcast(unsigned, i32x16.llvm), builder.bitcast(signed, i32x16.llvm)
        return emit_call(builder, "llvm.x86.avx512.vpdpbusd.512", i32x16.llvm, total, unsigned, signed)
    if PATH == "avx-vnni":
        parts = []
        for t, u, s in zip(*(_halves(builder, v) for v in (total, unsigned, signed)), strict=True):
            if llvm_version_info < (22,):
                u, s = builder.bitcast(u, t.type), builder.bitcast(s, t.type)
            parts.append(emit_call(builder, "llvm.x86.avx512.vpdpbusd.256", t.type, t, u, s))
        return _join(builder, *parts)
    if PATH == "neon":
        quarters = zip(
            *([q for h in _halves(builder, v) for q in _halves(builder, h)] for v in (total, unsigned, signed)),
            strict=True,
        )
        a, b, c, d = (emit_call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", t.type, t, u, s) for t, u, s in quarters)
        return _join(builder, _join(builder, a, b), _join(builder, c, d))
    for j in range(4):
        # Byte j of each 32-bit lane: moved to the top, then down again with zeros or with its sign.
        up, down = emit_constant(24 - 8 * j, i32x16), emit_constant(24, i32x16)
        u = builder.lshr(builder.shl(builder.bitcast(unsigned, i32x16.llvm), up), down)
        s = builder.ashr(builder.shl(builder.bitcast(signed, i32x16.llvm), up), down)
        total = builder.add(total, builder.mul(u, s))
    return total


def _pmaddwd(builder, a, b):
    return emit_call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), a, b)


def _shuffle(builder, first, second, order):
    mask = ir.Constant(ir.VectorType(I32, len(order)), order)
    return builder.shuffle_vector(first, first if second is None else second, mask)


def _halves(builder, vector) -> list:
    count = vector.type.count
    return [_shuffle(builder, vector, None, list(half)) for half in (range(count // 2), range(count // 2, count))]


def _join(builder, low, high):
    return _shuffle(builder, low, high, list(range(2 * low.type.count)))


def _narrow(builder, splat, vector):
    """The lower half of a splat i32x16, as another vector of 32 bytes."""
    return builder.bitcast(_shuffle(builder, splat, None, list(range(8))), vector)
