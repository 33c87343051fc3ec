"""LLVM vectors as Numba values: a kernel stays plain Python, and every line of it is one machine instruction or few.

Knows the processor, not what is computed on it. A vector lives in registers; a tuple of vectors is a register tile.

    f32x16   16 floats              i32x16   16 integers
    i8x64    64 bytes: what one int8 dot product eats, 4 for each of 16 sums
    i16x32   32 halves of such sums

In memory a float is float32, bfloat16 kept as uint16 (the upper half of a float32), or float16 kept as int16. A word
of uint32 is 32 bits whose meaning the kernel knows (bfloat16.py).
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, register_model

from tinyserve.tensor import _jit

LANES = 16

I8, I16, I32, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_ELEMENTS = {"f32": F32, "i32": I32, "i16": I16, "i8": I8}

# Sixteen floats are one register where there are 32 of 64 bytes; elsewhere LLVM makes two or four of them.
WIDE = _jit.has_feature("avx512f", "avx512bw")
_HALVES = _jit.has_feature("f16c") or _jit.has_feature("neon")  # float16 is converted by an instruction


class Vector(types.Type):
    """A fixed number of lanes of one element type, held in registers."""

    def __init__(self, element: str, lanes: int):
        self.element, self.lanes = element, lanes
        self.llvm = ir.VectorType(_ELEMENTS[element], lanes)
        super().__init__(name=f"{element}x{lanes}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.llvm)


f32x16, i32x16, i16x32, i8x64 = Vector("f32", 16), Vector("i32", 16), Vector("i16", 32), Vector("i8", 64)


# --- operators on two vectors of one type: + - * ; / on floats; << >> on integers -------------------------------------


def _operator(symbol: Callable, on_floats: str, on_integers: str) -> None:
    @infer_global(symbol)
    class Typing(AbstractTemplate):
        def generic(self, args, keywords):
            if len(args) == 2 and isinstance(args[0], Vector) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    @lower_builtin(symbol, Vector, Vector)
    def lower(context, builder, sig, args):
        name = on_floats if sig.return_type.element == "f32" else on_integers
        return getattr(builder, name)(*args)


_operator(operator.add, "fadd", "add")
_operator(operator.sub, "fsub", "sub")
_operator(operator.mul, "fmul", "mul")
_operator(operator.truediv, "fdiv", "")
_operator(operator.lshift, "", "shl")
_operator(operator.rshift, "", "ashr")


# --- emitting IR, here and in tiles.py ------------------------------------------------------------------------------


def emit_splat(builder, scalar, lanes=LANES):
    vector = ir.VectorType(scalar.type, lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def emit_constant(value, vector=f32x16):
    return ir.Constant(vector.llvm, [value] * vector.lanes)


def emit_call(builder, name, result, *args):
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def emit_address(context, builder, array_type, array, index, pointee):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), pointee.as_pointer())


def emit_load(context, builder, array_type, array, index):
    """16 floats from an array of float32, bfloat16, float16 or small integers; or 16 words, as they are."""
    if array_type.dtype in (types.float32, types.uint32):
        vector = loaded(array_type).llvm
        return builder.load(emit_address(context, builder, array_type, array, index, vector), align=1)
    if array_type.dtype == types.int8:
        narrow = ir.VectorType(I8, LANES)
        whole = builder.load(emit_address(context, builder, array_type, array, index, narrow), align=1)
        return builder.sitofp(builder.sext(whole, i32x16.llvm), f32x16.llvm)
    half = ir.VectorType(I16, LANES)
    bits = builder.load(emit_address(context, builder, array_type, array, index, half), align=1)
    return emit_widen(builder, array_type.dtype, bits)


def emit_widen(builder, kept_as, bits):
    """The float32 of 16-bit floats, a number or a vector: bfloat16 kept as uint16, float16 as int16."""
    count = bits.type.count if isinstance(bits.type, ir.VectorType) else 0

    def shaped(element):
        return ir.VectorType(element, count) if count else element

    def constant(element, value):
        return ir.Constant(shaped(element), [value] * count if count else value)

    if kept_as == types.int16 and _HALVES:
        return builder.fpext(builder.bitcast(bits, shaped(ir.HalfType())), shaped(F32))
    wide = builder.zext(bits, shaped(I32))
    if kept_as == types.uint16:
        return builder.bitcast(builder.shl(wide, constant(I32, 16)), shaped(F32))
    # float16 has its exponent 112 lower; the product puts denormals right too. Infinities are not kept so.
    sign = builder.shl(builder.and_(wide, constant(I32, 0x8000)), constant(I32, 16))
    magnitude = builder.shl(builder.and_(wide, constant(I32, 0x7FFF)), constant(I32, 13))
    scaled = builder.fmul(builder.bitcast(magnitude, shaped(F32)), constant(F32, 2.0**112))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, shaped(I32)), sign), shaped(F32))


def emit_lanes_below(builder, count):
    """The mask of lanes 0..count-1."""
    lanes = ir.Constant(i32x16.llvm, list(range(LANES)))
    return builder.icmp_signed("<", lanes, emit_splat(builder, builder.trunc(count, I32)))


def loaded(array: types.Array) -> Vector:
    """What 16 neighbours of this array are in registers."""
    return i32x16 if array.dtype == types.uint32 else f32x16


def _is_loadable(array) -> bool:
    kinds = (types.float32, types.uint32, types.uint16, types.int16, types.int8)
    return isinstance(array, types.Array) and array.dtype in kinds


# --- memory -------------------------------------------------------------------------------------------------------


@intrinsic
def load(typing_context, array, index):
    """16 neighbours of a flat index, as f32x16: from float32, bfloat16, float16 or small integers; words as i32x16."""
    if not _is_loadable(array):
        return None

    def codegen(context, builder, sig, args):
        return emit_load(context, builder, sig.args[0], *args)

    return loaded(array)(array, types.intp), codegen


@intrinsic
def as_float(typing_context, number):
    """One float32 from a float32, or from the 16 bits of a bfloat16 or float16."""

    def codegen(context, builder, sig, args):
        return args[0] if sig.args[0] == types.float32 else emit_widen(builder, sig.args[0], args[0])

    return types.float32(number), codegen


def emit_load_first(context, builder, array_type, array, index, count):
    """The first `count` of 16 neighbours; the other lanes are zero and their memory is not touched."""
    pointer = emit_address(context, builder, array_type, array, index, f32x16.llvm)
    masked = (pointer, ir.Constant(I32, 1), emit_lanes_below(builder, count), emit_constant(0.0))
    if WIDE:
        return emit_call(builder, "llvm.masked.load.v16f32.p0", f32x16.llvm, *masked)
    # Where masks are slow, nearly every vector is a whole one.
    whole = builder.icmp_signed(">=", count, ir.Constant(count.type, LANES))
    with builder.if_else(whole, likely=True) as (then, otherwise):
        with then:
            all_lanes, after_all = builder.load(pointer, align=1), builder.block
        with otherwise:
            some, after_some = emit_call(builder, "llvm.masked.load.v16f32.p0", f32x16.llvm, *masked), builder.block
    result = builder.phi(f32x16.llvm)
    result.add_incoming(all_lanes, after_all)
    result.add_incoming(some, after_some)
    return result


def emit_store_first(context, builder, array_type, array, index, vector, count):
    """Write the first `count` of 16 floats (all of them when count >= 16)."""
    pointer = emit_address(context, builder, array_type, array, index, f32x16.llvm)

    def masked():
        lanes = (ir.Constant(I32, 1), emit_lanes_below(builder, count))
        emit_call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), vector, pointer, *lanes)

    if WIDE:
        return masked()
    whole = builder.icmp_signed(">=", count, ir.Constant(count.type, LANES))
    with builder.if_else(whole, likely=True) as (then, otherwise):
        with then:
            builder.store(vector, pointer, align=1)
        with otherwise:
            masked()
    return None


def emit_rounded(builder, floats):
    """The bits of a float32, or of 16, rounded to bfloat16, which is their upper half; the lower one is to be dropped.

    A nan whose upper half alone would be an infinity, or round into one, stays a nan.
    """
    is_vector = isinstance(floats.type, ir.VectorType)
    kind = i32x16.llvm if is_vector else I32

    def constant(value):
        return ir.Constant(kind, [value] * LANES if is_vector else value)

    bits = builder.bitcast(floats, kind)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
    nan = builder.fcmp_unordered("uno", floats, floats)
    return builder.select(nan, builder.or_(bits, constant(0x00400000)), rounded)


@intrinsic
def as_kept(typing_context, array, number):
    """A float32 as an element of this array: itself, or rounded to bfloat16."""

    def codegen(context, builder, sig, args):
        if array.dtype == types.float32:
            return args[1]
        return builder.trunc(builder.lshr(emit_rounded(builder, args[1]), ir.Constant(I32, 16)), I16)

    return array.dtype(array, types.float32), codegen


@intrinsic
def load_first(typing_context, array, index, count):
    """The first `count` of 16 neighbours; the other lanes are zero and their memory is not touched."""
    if array.dtype != types.float32:
        return None

    def codegen(context, builder, sig, args):
        return emit_load_first(context, builder, sig.args[0], *args)

    return f32x16(array, types.intp, types.intp), codegen


@intrinsic
def store(typing_context, array, index, vector):
    """Write 16 floats at a flat index of a float32 array, or 16 words to one of uint32."""
    if array.dtype not in (types.float32, types.uint32):
        return None
    kind = loaded(array)

    def codegen(context, builder, sig, args):
        builder.store(args[2], emit_address(context, builder, sig.args[0], args[0], args[1], kind.llvm), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, kind), codegen


@intrinsic
def store_first(typing_context, array, index, vector, count):
    """Write the first `count` of 16 floats (all of them when count >= 16)."""
    if array.dtype != types.float32:
        return None

    def codegen(context, builder, sig, args):
        emit_store_first(context, builder, sig.args[0], *args)
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16, types.intp), codegen


# --- arithmetic ---------------------------------------------------------------------------------------------------


@intrinsic
def splat(typing_context, scalar):
    """The same number in all 16 lanes: a float gives f32x16, an integer i32x16."""
    if isinstance(scalar, types.Float):
        return f32x16(types.float32), lambda context, builder, sig, args: emit_splat(builder, args[0])
    return i32x16(types.int32), lambda context, builder, sig, args: emit_splat(builder, args[0])


def _function(argument_types: tuple, result: Vector | types.Type, emit: Callable) -> Any:
    """An intrinsic on vectors, from a function that emits its IR."""

    def codegen(context, builder, sig, args):
        return emit(builder, *args)

    sig = result(*argument_types)
    if len(argument_types) == 1:
        return intrinsic(lambda typing_context, a: (sig, codegen))
    if len(argument_types) == 2:
        return intrinsic(lambda typing_context, a, b: (sig, codegen))
    return intrinsic(lambda typing_context, a, b, c: (sig, codegen))


_F, _I = f32x16, i32x16
fma = _function((_F, _F, _F), _F, lambda b, x, y, z: emit_call(b, "llvm.fma.v16f32", _F.llvm, x, y, z))
maximum = _function((_F, _F), _F, lambda b, x, y: emit_call(b, "llvm.maxnum.v16f32", _F.llvm, x, y))
# One instruction, where `maximum` takes three to pass over a nan: if either is one, this is y.
larger = _function((_F, _F), _F, lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
minimum = _function((_F, _F), _F, lambda b, x, y: emit_call(b, "llvm.minnum.v16f32", _F.llvm, x, y))
absolute = _function((_F,), _F, lambda b, x: emit_call(b, "llvm.fabs.v16f32", _F.llvm, x))
copy_sign = _function((_F, _F), _F, lambda b, x, y: emit_call(b, "llvm.copysign.v16f32", _F.llvm, x, y))
round_to_int = _function((_F,), _I, lambda b, x: b.fptosi(emit_call(b, "llvm.rint.v16f32", _F.llvm, x), _I.llvm))
to_float = _function((_I,), _F, lambda b, x: b.sitofp(x, _F.llvm))
# The order of a sum is part of the result: pairwise over the lanes, by shuffles, the same on every processor.
max_lane = _function(
    (_F,), types.float32, lambda b, x: _fold(b, x, lambda p, q: emit_call(b, "llvm.maxnum.v16f32", _F.llvm, p, q))
)
larger_lane = _function(
    (_F,), types.float32, lambda b, x: _fold(b, x, lambda p, q: b.select(b.fcmp_ordered(">", p, q), p, q))
)
sum_lanes = _function((_F,), types.float32, lambda b, x: _fold(b, x, b.fadd))
# The bits of |x| as integers: they are in the order of the numbers, with infinity and then nan behind them.
magnitude_bits = _function((_F,), _I, lambda b, x: b.and_(b.bitcast(x, _I.llvm), emit_constant(0x7FFFFFFF, i32x16)))
larger_int = _function((_I, _I), _I, lambda b, x, y: b.select(b.icmp_signed(">", x, y), x, y))
max_lane_int = _function(
    (_I,), types.int32, lambda b, x: _fold(b, x, lambda p, q: b.select(b.icmp_signed(">", p, q), p, q))
)
float_of_bits = _function((types.int32,), types.float32, lambda b, bits: b.bitcast(bits, F32))
sum_lanes_int = _function((_I,), types.int32, lambda b, x: _fold(b, x, b.add))
first_lanes = _function(
    (_F, _F, types.intp), _F, lambda b, x, other, count: b.select(emit_lanes_below(b, count), x, other)
)


# A bit for each lane: 1 where the first is at least the second. And back: a lane of the first where a bit is 1.
_BITS = ir.VectorType(ir.IntType(1), LANES)
bits_at_least = _function(
    (_F, _F), types.int64, lambda b, x, y: b.zext(b.bitcast(b.fcmp_ordered(">=", x, y), I16), ir.IntType(64))
)
bits_to_lanes = _function(
    (types.uint32, _F, _F), _F, lambda b, bits, x, y: b.select(b.bitcast(b.trunc(bits, I16), _BITS), x, y)
)
first_bit = _function((types.int64,), types.int64, lambda b, bits: b.cttz(bits, ir.Constant(ir.IntType(1), 1)))


def _fold(builder, vector, combine):
    step = LANES // 2
    while step:
        order = ir.Constant(ir.VectorType(I32, LANES), [(i + step) % LANES for i in range(LANES)])
        vector = combine(vector, builder.shuffle_vector(vector, vector, order))
        step //= 2
    return builder.extract_element(vector, ir.Constant(I32, 0))


# e^x = 2^n · e^r with |r| <= ln(2)/2; the polynomial is Cephes' expf, within 2 units in the last place.
_EXP_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def _emit_exp(builder, x):
    def fused(p, q, r):
        return emit_call(builder, "llvm.fma.v16f32", f32x16.llvm, p, q, r)

    # One instruction each, and a nan passes: if either is one, vmaxps and vminps give their second.
    lowest, highest = emit_constant(-87.3), emit_constant(88.3)
    clamped = builder.select(builder.fcmp_ordered(">", lowest, x), lowest, x)
    clamped = builder.select(builder.fcmp_ordered("<", highest, clamped), highest, clamped)
    n = emit_call(builder, "llvm.rint.v16f32", f32x16.llvm, builder.fmul(clamped, emit_constant(1.44269504088896341)))
    r = fused(n, emit_constant(-0.693359375), clamped)
    r = fused(n, emit_constant(2.12194440e-4), r)
    p = emit_constant(_EXP_POLYNOMIAL[0])
    for coefficient in _EXP_POLYNOMIAL[1:]:
        p = fused(p, r, emit_constant(coefficient))
    p = fused(p, builder.fmul(r, r), builder.fadd(r, emit_constant(1.0)))
    exponent = builder.shl(
        builder.add(builder.fptosi(n, i32x16.llvm), emit_constant(127, i32x16)), emit_constant(23, i32x16)
    )
    result = builder.fmul(p, builder.bitcast(exponent, f32x16.llvm))
    # Below the smallest normal float the answer is zero, which a masked score of -inf relies on; nan stays nan.
    return builder.select(builder.fcmp_ordered("<", x, lowest), emit_constant(0.0), result)


exp = _function((_F,), _F, _emit_exp)
