"""Numbers in memory for products of floats: float32, or pairs of bfloat16 in words, and the instruction for those.

A word (uint32) holds two bfloat16, the first in its lower half. AVX512-BF16's vdpbf16ps adds two products to each of 16
sums, at the rate at which a float32 instruction adds one: first that of the upper halves, then that of the lower ones,
each a multiply-add that is rounded once. "fma" is the same in two instructions, and comes to the same bits, but for
numbers below 2^-126, which vdpbf16ps takes for zero.
"""

import os

from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import types
from numba.extending import intrinsic

from tinyserve.tensor import _jit
from tinyserve.tensor.simd import (
    F32,
    I16,
    I32,
    LANES,
    emit_address,
    emit_call,
    emit_constant,
    emit_rounded,
    emit_splat,
    f32x16,
    i32x16,
)

PATHS = ("avx512-bf16", "fma")
VARIABLE = "TINYSERVE_BFLOAT16"
_PROBE = "from tinyserve.tensor import probe; probe.check_bfloat16()"


class _BFloat(ir.Type):
    """LLVM's type, for which llvmlite has no name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


def choose() -> str:
    """The instruction, where the processor has it and it passed the probe; TINYSERVE_BFLOAT16 overrules."""
    if (forced := os.environ.get(VARIABLE)) in PATHS:
        return str(forced)
    if llvm_version_info < (17,) or not _jit.has_feature("avx512f", "avx512bw", "avx512bf16"):
        return "fma"
    return "avx512-bf16" if _jit.runs("avx512-bf16", _PROBE, {VARIABLE: "avx512-bf16"}) else "fma"


PATH = choose()


def is_pairs(array: types.Array) -> bool:
    """Whether an array is one of words that are pairs."""
    return bool(array.dtype == types.uint32)


def emit_operand(builder, words):
    """16 words as `emit_dot` takes them: done once for all rows."""
    return builder.bitcast(words, _PAIRS) if PATH == "avx512-bf16" else _halves(builder, words, i32x16.llvm)


def emit_dot(builder, total, operand, word):
    """total[i] + the two products of operand[i] and one word."""
    if PATH == "avx512-bf16":
        pairs = builder.bitcast(emit_splat(builder, word), _PAIRS)
        return emit_call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", f32x16.llvm, total, operand, pairs)
    for half, factor in zip(reversed(operand), reversed(_halves(builder, word, I32)), strict=True):
        total = emit_call(builder, "llvm.fma.v16f32", f32x16.llvm, half, emit_splat(builder, factor), total)
    return total


def _halves(builder, words, kind):
    """The float32 of the lower and of the upper halves: of a word, or of 16."""

    def constant(value):
        return ir.Constant(kind, value if kind == I32 else [value] * LANES)

    floats = F32 if kind == I32 else f32x16.llvm
    low, high = builder.shl(words, constant(16)), builder.and_(words, constant(-1 << 16))
    return builder.bitcast(low, floats), builder.bitcast(high, floats)


@intrinsic
def numbers_per_word(typing_context, array):
    """How many numbers an element of this array holds: 2 where it is a word of bfloat16, else 1."""
    numbers = 2 if is_pairs(array) else 1
    return types.intp(array), lambda context, builder, sig, args: ir.Constant(ir.IntType(64), numbers)


@intrinsic
def store_numbers(typing_context, array, number, first, second):
    """Write 32 floats from a number of this array on, an even one: float32, or rounded to bfloat16."""

    def codegen(context, builder, sig, args):
        data, at, *vectors = args
        if not is_pairs(array):
            for i, vector in enumerate(vectors):
                place = builder.add(at, ir.Constant(at.type, i * LANES))
                builder.store(vector, emit_address(context, builder, array, data, place, f32x16.llvm), align=1)
            return context.get_dummy_value()
        word = builder.ashr(at, ir.Constant(at.type, 1))
        builder.store(
            _emit_pairs(builder, *vectors), emit_address(context, builder, array, data, word, i32x16.llvm), align=1
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16, f32x16), codegen


@intrinsic
def add_weights(typing_context, array, first, second, third, fourth):
    """16 sums of four each of 64 floats, as they would be written to this array."""

    def codegen(context, builder, sig, args):
        _, a, b, c, d = args
        if not is_pairs(array):
            return builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
        ones, total = ir.Constant(I32, 0x3F803F80), emit_constant(0.0)
        for pair in (_emit_pairs(builder, a, b), _emit_pairs(builder, c, d)):
            total = emit_dot(builder, total, emit_operand(builder, pair), ones)
        return total

    return f32x16(array, f32x16, f32x16, f32x16, f32x16), codegen


def _emit_pairs(builder, first, second):
    """32 floats rounded to bfloat16, as 16 words in their order."""
    if PATH == "avx512-bf16":
        pairs = emit_call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _PAIRS, second, first)
        return builder.bitcast(pairs, i32x16.llvm)
    half, order = ir.VectorType(I16, LANES), ir.Constant(ir.VectorType(I32, 2 * LANES), list(range(2 * LANES)))
    halves = (
        builder.trunc(builder.lshr(emit_rounded(builder, vector), emit_constant(16, i32x16)), half)
        for vector in (first, second)
    )
    return builder.bitcast(builder.shuffle_vector(*halves, order), i32x16.llvm)


@intrinsic
def first_of_pairs(typing_context, array, tile):
    """A tile of this array's elements, without the second numbers of its words."""

    def codegen(context, builder, sig, args):
        if not is_pairs(array):
            return args[1]
        vectors = [builder.extract_value(args[1], i) for i in range(tile.count)]
        kept = [builder.and_(vector, emit_constant(0xFFFF, i32x16)) for vector in vectors]
        return context.make_tuple(builder, tile, kept)

    return tile(array, tile), codegen


def _copy(kind):
    """An intrinsic that copies a word, or a number of one: target[index] = source[at], counted in such."""

    @intrinsic
    def copy(typing_context, target, index, source, at):
        def codegen(context, builder, sig, args):
            start = ir.Constant(ir.IntType(64), 0)
            to, source_of = (
                builder.gep(emit_address(context, builder, sig.args[i], args[i], start, kind), [args[i + 1]])
                for i in (0, 2)
            )
            builder.store(builder.load(source_of), to)
            return context.get_dummy_value()

        return types.void(target, types.intp, source, types.intp), codegen

    return copy


copy_word, copy_half = _copy(I32), _copy(I16)


@intrinsic
def keep(typing_context, array, index, part, number, inverse):
    """Write a float32 as element `index` of an array: itself, number · inverse rounded to int8, or, rounded to
    bfloat16, a word's number `part`.
    """

    def codegen(context, builder, sig, args):
        data, at, half, value, factor = args
        if array.dtype == types.float32:
            builder.store(value, emit_address(context, builder, array, data, at, F32))
        elif array.dtype == types.int8:
            whole = emit_call(builder, "llvm.rint.f32", F32, builder.fmul(value, factor))
            byte = ir.IntType(8)
            builder.store(builder.fptosi(whole, byte), emit_address(context, builder, array, data, at, byte))
        else:
            bits = builder.trunc(builder.lshr(emit_rounded(builder, value), ir.Constant(I32, 16)), I16)
            pair = emit_address(context, builder, array, data, at, I16)
            builder.store(bits, builder.gep(pair, [half]))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, types.float32, types.float32), codegen
