"""Register tiles: tuples of vectors, row after row, on which one operation is many instructions.

Knows how a tile is laid out and how a matrix product steps through it. The loops over rows and panels run while the
kernel is compiled; in machine code a tile is so many registers.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from tinyserve.tensor.simd import (
    F32,
    I32,
    LANES,
    Vector,
    emit_address,
    emit_call,
    emit_constant,
    emit_dot,
    emit_lanes_below,
    emit_load,
    emit_splat,
    f32x16,
    i8x64,
    i32x16,
)


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
        return context.make_tuple(builder, tile, [emit_constant(0.0)] * tile.count)

    return tile(count), codegen


@intrinsic
def load_tile(typing_context, count, array, index, stride):
    """`count` f32x16 from flat indices index, index + stride, ..."""
    tile = _tile(f32x16, _length(count))

    def codegen(context, builder, sig, args):
        _, array_value, at, stride_value = args
        vectors = []
        for _ in range(tile.count):
            vectors.append(emit_load(context, builder, sig.args[1], array_value, at))
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
            pointer = emit_address(context, builder, sig.args[2], args[2], at, F32)
            factor = emit_splat(builder, builder.load(pointer))
            for p, vector in enumerate(vectors):
                i = row * len(vectors) + p
                sums[i] = emit_call(builder, "llvm.fma.v16f32", f32x16.llvm, vector, factor, sums[i])
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
            pointer = emit_address(context, builder, sig.args[2], args[2], at, i8x64.llvm)
            weights.append(builder.load(pointer, align=1))
            at = builder.add(at, args[4])
        at = args[6]
        for row in range(len(sums) // count):
            four = builder.load(emit_address(context, builder, sig.args[5], args[5], at, I32), align=1)
            inputs = builder.bitcast(emit_splat(builder, four), i8x64.llvm)
            for p, weight in enumerate(weights):
                sums[row * count + p] = emit_dot(builder, sums[row * count + p], weight, inputs)
            at = builder.add(at, args[7])
        return context.make_tuple(builder, sig.return_type, sums)

    return tile(tile, panels, w, types.intp, types.intp, x, types.intp, types.intp), codegen


@intrinsic
def load_panels(typing_context, array, first, second, third, fourth):
    """A tile of four f32x16 from four flat indices: neighbours that live in different pages."""
    tile = _tile(f32x16, 4)

    def codegen(context, builder, sig, args):
        vectors = [emit_load(context, builder, sig.args[0], args[0], at) for at in args[1:]]
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
                vectors.append(emit_load(context, builder, sig.args[2], array_value, place))
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
                pointer = emit_address(context, builder, sig.args[0], args[0], builder.add(at, offset), f32x16.llvm)
                mask = emit_lanes_below(builder, builder.sub(args[5], offset))
                value = vectors[r * per_row + p]
                emit_call(
                    builder,
                    "llvm.masked.store.v16f32.p0",
                    ir.VoidType(),
                    value,
                    pointer,
                    ir.Constant(I32, 1),
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
            pointer = emit_address(context, builder, sig.args[3], args[3], at, I32)
            vectors += [emit_constant(0, i32x16)] * (per_row * (digit_count - 1))
            vectors += [emit_splat(builder, builder.load(pointer))] * per_row
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
            pointer = emit_address(context, builder, sig.args[3], args[3], at, F32)
            scale = emit_splat(builder, builder.load(pointer))
            for p in range(count):
                value = integers[r * bytes_per_input * count + p]
                if bytes_per_input == 2:
                    low = integers[(2 * r + 1) * count + p]
                    value = builder.add(builder.shl(value, emit_constant(8, i32x16)), low)
                both = builder.fmul(w_scales[p], scale)
                i = r * count + p
                totals[i] = emit_call(
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
