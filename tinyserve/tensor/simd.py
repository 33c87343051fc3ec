"""LLVM vectors as Numba values: a kernel stays plain Python, and every line of it is one machine instruction or few.

Knows the processor, not what is computed on it. A vector lives in registers; a tuple of vectors is a register tile.

    f32x16   16 floats              i32x16   16 integers
    i8x64    64 bytes: what one int8 dot product eats, 4 for each of 16 sums
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.errors import TypingError
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, register_model

from tinyserve.tensor import _jit

LANES = 16

_I8, _I16, _I32, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
_ELEMENTS = {"f32": _F32, "i32": _I32, "i8": _I8}


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


f32x16, i32x16, i8x64 = Vector("f32", 16), Vector("i32", 16), Vector("i8", 64)


# --- operators: + - * on two vectors of one type; & << >> on integers ---------------------------------------------


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
_operator(operator.truediv, "fdiv", "sdiv")
_operator(operator.and_, "", "and_")
_operator(operator.lshift, "", "shl")
_operator(operator.rshift, "", "ashr")


# --- emitting IR --------------------------------------------------------------------------------------------------


def _splat(builder, scalar, lanes=LANES):
    vector = ir.VectorType(scalar.type, lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _constant(value, vector=f32x16):
    return ir.Constant(vector.llvm, [value] * vector.lanes)


def _call(builder, name, result, *args):
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(function, args)


def _address(context, builder, array_type, array, index, pointee):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), pointee.as_pointer())


def _load_f32(context, builder, array_type, array, index):
    """16 floats from an array of float32, or of bfloat16 kept as uint16 (the upper half of a float32)."""
    if array_type.dtype == types.float32:
        return builder.load(_address(context, builder, array_type, array, index, f32x16.llvm), align=1)
    half = ir.VectorType(_I16, LANES)
    bits = builder.zext(builder.load(_address(context, builder, array_type, array, index, half), align=1), i32x16.llvm)
    return builder.bitcast(builder.shl(bits, _constant(16, i32x16)), f32x16.llvm)


def _bf16(builder, vector):
    """Round 16 floats to bfloat16, ties to even, and return their bits."""
    bits = builder.bitcast(vector, i32x16.llvm)
    odd = builder.and_(builder.lshr(bits, _constant(16, i32x16)), _constant(1, i32x16))
    rounded = builder.add(bits, builder.add(odd, _constant(0x7FFF, i32x16)))
    return builder.trunc(builder.lshr(rounded, _constant(16, i32x16)), ir.VectorType(_I16, LANES))


def _lanes_below(builder, count):
    """The mask of lanes 0..count-1."""
    lanes = ir.Constant(i32x16.llvm, list(range(LANES)))
    return builder.icmp_signed("<", lanes, _splat(builder, builder.trunc(count, _I32)))


def _is_float_array(array) -> bool:
    return isinstance(array, types.Array) and array.dtype in (types.float32, types.uint16)


# --- memory -------------------------------------------------------------------------------------------------------


@intrinsic
def load(typing_context, array, index):
    """16 neighbours of a flat index, as f32x16: from float32, or from uint16 that holds bfloat16."""
    if not _is_float_array(array):
        return None

    def codegen(context, builder, sig, args):
        return _load_f32(context, builder, sig.args[0], *args)

    return f32x16(array, types.intp), codegen


@intrinsic
def as_float(typing_context, number):
    """One float32 from a float32, or from a uint16 that holds a bfloat16."""

    def codegen(context, builder, sig, args):
        if sig.args[0] == types.float32:
            return args[0]
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(number), codegen


@intrinsic
def load_first(typing_context, array, index, count):
    """The first `count` of 16 neighbours; the other lanes are zero and their memory is not touched."""
    if array.dtype != types.float32:
        return None

    def codegen(context, builder, sig, args):
        pointer = _address(context, builder, sig.args[0], args[0], args[1], f32x16.llvm)
        return _call(
            builder, "llvm.masked.load.v16f32.p0", f32x16.llvm,
            pointer, ir.Constant(_I32, 1), _lanes_below(builder, args[2]), _constant(0.0),
        )  # fmt: skip

    return f32x16(array, types.intp, types.intp), codegen


@intrinsic
def store(typing_context, array, index, vector):
    """Write 16 floats at a flat index, rounded to bfloat16 where the array is uint16."""

    def codegen(context, builder, sig, args):
        value = args[2] if sig.args[0].dtype == types.float32 else _bf16(builder, args[2])
        builder.store(value, _address(context, builder, sig.args[0], args[0], args[1], value.type), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16), codegen


@intrinsic
def store_first(typing_context, array, index, vector, count):
    """Write the first `count` of 16 floats (all of them when count >= 16)."""
    if array.dtype != types.float32:
        return None

    def codegen(context, builder, sig, args):
        pointer = _address(context, builder, sig.args[0], args[0], args[1], f32x16.llvm)
        mask = _lanes_below(builder, args[3])
        _call(
            builder,
            "llvm.masked.store.v16f32.p0",
            ir.VoidType(),
            args[2],
            pointer,
            ir.Constant(_I32, 1),
            mask,
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, f32x16, types.intp), codegen


@intrinsic
def load_int8(typing_context, array, index):
    """16 neighbouring int8 values as f32x16."""

    def codegen(context, builder, sig, args):
        pointer = _address(context, builder, sig.args[0], args[0], args[1], ir.VectorType(_I8, LANES))
        return builder.sitofp(builder.load(pointer, align=1), f32x16.llvm)

    return f32x16(array, types.intp), codegen


@intrinsic
def store_int8(typing_context, array, index, vector):
    """Write the low bytes of 16 integers."""

    def codegen(context, builder, sig, args):
        narrow = builder.trunc(args[2], ir.VectorType(_I8, LANES))
        builder.store(narrow, _address(context, builder, sig.args[0], args[0], args[1], narrow.type), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, i32x16), codegen


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of a flat index, ahead of its use."""

    def codegen(context, builder, sig, args):
        pointer = _address(context, builder, sig.args[0], args[0], args[1], _I8)
        flags = [ir.Constant(_I32, n) for n in (0, 3, 1)]  # read, keep in every cache level, data
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *flags)
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


# --- arithmetic ---------------------------------------------------------------------------------------------------


@intrinsic
def splat(typing_context, scalar):
    """The same number in all 16 lanes: a float gives f32x16, an integer i32x16."""
    if isinstance(scalar, types.Float):
        return f32x16(types.float32), lambda context, builder, sig, args: _splat(builder, args[0])
    return i32x16(types.int32), lambda context, builder, sig, args: _splat(builder, args[0])


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
fma = _function((_F, _F, _F), _F, lambda b, x, y, z: _call(b, "llvm.fma.v16f32", _F.llvm, x, y, z))
maximum = _function((_F, _F), _F, lambda b, x, y: _call(b, "llvm.maxnum.v16f32", _F.llvm, x, y))
absolute = _function((_F,), _F, lambda b, x: _call(b, "llvm.fabs.v16f32", _F.llvm, x))
round_to_int = _function((_F,), _I, lambda b, x: b.fptosi(_call(b, "llvm.rint.v16f32", _F.llvm, x), _I.llvm))
to_float = _function((_I,), _F, lambda b, x: b.sitofp(x, _F.llvm))
# The order of a sum is part of the result: pairwise over the lanes, by shuffles, the same on every processor.
max_lane = _function(
    (_F,), types.float32, lambda b, x: _fold(b, x, lambda p, q: _call(b, "llvm.maxnum.v16f32", _F.llvm, p, q))
)
sum_lanes = _function((_F,), types.float32, lambda b, x: _fold(b, x, b.fadd))
sum_lanes_int = _function((_I,), types.int32, lambda b, x: _fold(b, x, b.add))
first_lanes = _function((_F, _F, types.intp), _F, lambda b, x, other, count: b.select(_lanes_below(b, count), x, other))


def _fold(builder, vector, combine):
    step = LANES // 2
    while step:
        order = ir.Constant(ir.VectorType(_I32, LANES), [(i + step) % LANES for i in range(LANES)])
        vector = combine(vector, builder.shuffle_vector(vector, vector, order))
        step //= 2
    return builder.extract_element(vector, ir.Constant(_I32, 0))


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
        return _call(builder, "llvm.fma.v16f32", f32x16.llvm, p, q, r)

    clamped = _call(builder, "llvm.maxnum.v16f32", f32x16.llvm, x, _constant(-87.3))
    clamped = _call(builder, "llvm.minnum.v16f32", f32x16.llvm, clamped, _constant(88.3))
    n = _call(builder, "llvm.rint.v16f32", f32x16.llvm, builder.fmul(clamped, _constant(1.44269504088896341)))
    r = fused(n, _constant(-0.693359375), clamped)
    r = fused(n, _constant(2.12194440e-4), r)
    p = _constant(_EXP_POLYNOMIAL[0])
    for coefficient in _EXP_POLYNOMIAL[1:]:
        p = fused(p, r, _constant(coefficient))
    p = fused(p, builder.fmul(r, r), builder.fadd(r, _constant(1.0)))
    exponent = builder.shl(builder.add(builder.fptosi(n, i32x16.llvm), _constant(127, i32x16)), _constant(23, i32x16))
    result = builder.fmul(p, builder.bitcast(exponent, f32x16.llvm))
    # Below the smallest normal float the answer is zero, which a masked score of -inf relies on.
    return builder.select(builder.fcmp_ordered("<", x, _constant(-87.3)), _constant(0.0), result)


exp = _function((_F,), _F, _emit_exp)


# --- register tiles: tuples of vectors, row after row -------------------------------------------------------------


def _tile(vector: Vector, count: int) -> types.UniTuple:
    return types.UniTuple(vector, count)


def _length(number) -> int:
    if not isinstance(number, types.IntegerLiteral):
        raise TypingError("a tile's size is a constant of the kernel")
    return number.literal_value


@intrinsic
def zeros(typing_context, count):
    """A tile of `count` f32x16, all zero."""
    tile = _tile(f32x16, _length(count))

    def codegen(context, builder, sig, args):
        return context.make_tuple(builder, tile, [_constant(0.0)] * tile.count)

    return tile(count), codegen


@intrinsic
def load_tile(typing_context, count, array, index, stride):
    """`count` f32x16 from flat indices index, index + stride, ..."""
    tile = _tile(f32x16, _length(count))

    def codegen(context, builder, sig, args):
        _, array_value, at, stride_value = args
        vectors = []
        for _ in range(tile.count):
            vectors.append(_load_f32(context, builder, sig.args[1], array_value, at))
            at = builder.add(at, stride_value)
        return context.make_tuple(builder, tile, vectors)

    return tile(count, array, types.intp, types.intp), codegen


@intrinsic
def fma_rows(typing_context, tile, panels, x, index, stride):
    """tile[r, p] + panels[p] · x[index + r·stride]: one step of a matrix product, for every row r and panel p."""

    def codegen(context, builder, sig, args):
        sums = list(cgutils.unpack_tuple(builder, args[0]))
        vectors = cgutils.unpack_tuple(builder, args[1])
        at = args[3]
        for row in range(len(sums) // len(vectors)):
            pointer = _address(context, builder, sig.args[2], args[2], at, _F32)
            factor = _splat(builder, builder.load(pointer))
            for p, vector in enumerate(vectors):
                i = row * len(vectors) + p
                sums[i] = _call(builder, "llvm.fma.v16f32", f32x16.llvm, vector, factor, sums[i])
            at = builder.add(at, args[4])
        return context.make_tuple(builder, sig.return_type, sums)

    return tile(tile, panels, x, types.intp, types.intp), codegen


@intrinsic
def dot_rows(typing_context, tile, panels, w, w_index, w_stride, x, index, stride):
    """tile[r, p] + the int8 dot products of w's panel p with row r of x: four inputs, for every row r and panel p.

    `panels` is the (literal) number of panels; w is unsigned and has 64 bytes a panel at w_index + p·w_stride,
    x is signed and has 4 bytes at index + r·stride, used for all 16 outputs of a panel.
    """
    count = _length(panels)

    def codegen(context, builder, sig, args):
        sums = list(cgutils.unpack_tuple(builder, args[0]))
        at, weights = args[3], []
        for _ in range(count):
            pointer = _address(context, builder, sig.args[2], args[2], at, i8x64.llvm)
            weights.append(builder.load(pointer, align=1))
            at = builder.add(at, args[4])
        at = args[6]
        for row in range(len(sums) // count):
            four = builder.load(_address(context, builder, sig.args[5], args[5], at, _I32), align=1)
            inputs = builder.bitcast(_splat(builder, four), i8x64.llvm)
            for p, weight in enumerate(weights):
                sums[row * count + p] = _emit_dot(builder, sums[row * count + p], weight, inputs)
            at = builder.add(at, args[7])
        return context.make_tuple(builder, sig.return_type, sums)

    return tile(tile, panels, w, types.intp, types.intp, x, types.intp, types.intp), codegen


@intrinsic
def load_panels(typing_context, array, first, second, third, fourth):
    """A tile of four f32x16 from four flat indices: neighbours that live in different pages."""
    tile = _tile(f32x16, 4)

    def codegen(context, builder, sig, args):
        vectors = [_load_f32(context, builder, sig.args[0], args[0], at) for at in args[1:]]
        return context.make_tuple(builder, tile, vectors)

    return tile(array, types.intp, types.intp, types.intp, types.intp), codegen


@intrinsic
def load_rows(typing_context, rows, panels, array, index, stride):
    """A tile whose row r is the `panels` f32x16 from index + r·stride on."""
    row_count, per_row = _length(rows), _length(panels)
    tile = _tile(f32x16, row_count * per_row)

    def codegen(context, builder, sig, args):
        _, _, array_value, at, stride_value = args
        vectors = []
        for _ in range(row_count):
            for p in range(per_row):
                place = builder.add(at, ir.Constant(at.type, p * LANES))
                vectors.append(_load_f32(context, builder, sig.args[2], array_value, place))
            at = builder.add(at, stride_value)
        return context.make_tuple(builder, tile, vectors)

    return tile(rows, panels, array, types.intp, types.intp), codegen


@intrinsic
def store_rows(typing_context, y, index, stride, tile, panels, count):
    """Write tile[r, p] at index + r·stride + 16·p; of each row's numbers only the first `count`."""
    per_row = _length(panels)

    def codegen(context, builder, sig, args):
        vectors = cgutils.unpack_tuple(builder, args[3])
        at = args[1]
        for r in range(len(vectors) // per_row):
            for p in range(per_row):
                offset = ir.Constant(at.type, p * LANES)
                pointer = _address(context, builder, sig.args[0], args[0], builder.add(at, offset), f32x16.llvm)
                mask = _lanes_below(builder, builder.sub(args[5], offset))
                value = vectors[r * per_row + p]
                _call(
                    builder,
                    "llvm.masked.store.v16f32.p0",
                    ir.VoidType(),
                    value,
                    pointer,
                    ir.Constant(_I32, 1),
                    mask,
                )
            at = builder.add(at, args[2])
        return context.get_dummy_value()

    return types.void(y, types.intp, types.intp, tile, panels, types.intp), codegen


@intrinsic
def start_rows(typing_context, rows, digits, panels, starts, index, stride):
    """An i32x16 tile of rows · digits rows: row r's lowest digit holds starts[index + r·stride], the others zero."""
    digit_count, per_row = _length(digits), _length(panels)
    tile = _tile(i32x16, _length(rows) * digit_count * per_row)

    def codegen(context, builder, sig, args):
        at, vectors = args[4], []
        for _ in range(_length(rows)):
            pointer = _address(context, builder, sig.args[3], args[3], at, _I32)
            vectors += [_constant(0, i32x16)] * (per_row * (digit_count - 1))
            vectors += [_splat(builder, builder.load(pointer))] * per_row
            at = builder.add(at, args[5])
        return context.make_tuple(builder, tile, vectors)

    return tile(rows, digits, panels, starts, types.intp, types.intp), codegen


@intrinsic
def scaled_rows(typing_context, tile, sums, panels, x_scale, index, stride):
    """tile[r, p] + float(sums[r, p]) · panels[p] · x_scale[index + r·stride].

    Where sums has twice the tile's rows, they are high and low bytes: row r is 256 · sums[2r] + sums[2r + 1].
    """

    def codegen(context, builder, sig, args):
        totals = list(cgutils.unpack_tuple(builder, args[0]))
        integers = cgutils.unpack_tuple(builder, args[1])
        w_scales = cgutils.unpack_tuple(builder, args[2])
        count, at = len(w_scales), args[4]
        rows = len(totals) // count
        bytes_per_input = len(integers) // len(totals)
        for r in range(rows):
            pointer = _address(context, builder, sig.args[3], args[3], at, _F32)
            scale = _splat(builder, builder.load(pointer))
            for p in range(count):
                value = integers[r * bytes_per_input * count + p]
                if bytes_per_input == 2:
                    low = integers[(2 * r + 1) * count + p]
                    value = builder.add(builder.shl(value, _constant(8, i32x16)), low)
                both = builder.fmul(w_scales[p], scale)
                i = r * count + p
                totals[i] = _call(
                    builder,
                    "llvm.fma.v16f32",
                    f32x16.llvm,
                    builder.sitofp(value, f32x16.llvm),
                    both,
                    totals[i],
                )
            at = builder.add(at, args[5])
        return context.make_tuple(builder, sig.return_type, totals)

    return tile(tile, sums, panels, x_scale, types.intp, types.intp), codegen


# --- the int8 dot product -----------------------------------------------------------------------------------------

DOT_PRODUCT = "avx512-vnni" if _jit.has_feature("avx512f", "avx512bw", "avx512vnni") else "plain"


def _emit_dot(builder, total, unsigned, signed):
    """total[i] + sum over j < 4 of unsigned[4i+j] · signed[4i+j], exactly, in 32-bit integers."""
    if DOT_PRODUCT == "avx512-vnni":
        return _call(builder, "llvm.x86.avx512.vpdpbusd.512", i32x16.llvm, total, unsigned, signed)
    for j in range(4):
        # Byte j of each 32-bit lane: moved to the top, then down again with zeros or with its sign.
        up, down = _constant(24 - 8 * j, i32x16), _constant(24, i32x16)
        u = builder.lshr(builder.shl(builder.bitcast(unsigned, i32x16.llvm), up), down)
        s = builder.ashr(builder.shl(builder.bitcast(signed, i32x16.llvm), up), down)
        total = builder.add(total, builder.mul(u, s))
    return total
