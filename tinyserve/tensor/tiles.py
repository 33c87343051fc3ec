"""Register tiles: tuples of vectors, row after row, on which one operation is many instructions.

Knows how a tile is laid out and how a matrix product steps through it. The loops over rows and panels run while the
kernel is compiled; in machine code a tile is so many registers.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from tinyserve.tensor import bfloat16, dot_product
from tinyserve.tensor.simd import (
    F32,
    I8,
    I32,
    LANES,
    WIDE,
    Vector,
    emit_address,
    emit_call,
    emit_constant,
    emit_load,
    emit_splat,
    emit_store_first,
    emit_widen,
    f32x16,
    i8x64,
    i16x32,
    i32x16,
    loaded,
)

# How many panels of 16 a tile of three rows has, so that its sums fill the registers and do not spill.
PANELS = 4 if WIDE else 1


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
    """`count` f32x16 from flat indices index, index + stride, ...; of words i32x16."""
    tile = _tile(loaded(array), _length(count))

    def codegen(context, builder, sig, args):
        _, array_value, at, stride_value = args
        vectors = []
        for _ in range(tile.count):
            vectors.append(emit_load(context, builder, sig.args[1], array_value, at))
            at = builder.add(at, stride_value)
        return context.make_tuple(builder, tile, vectors)

    return tile(count, array, types.intp, types.intp), codegen


@intrinsic
def prefetch_panels(typing_context, count, array, index, stride):
    """Ask for `count` cache lines at flat indices index, index + stride, ..., each of which is read once.

    Past the array's end it is no harm.
    """

    panels = _length(count)

    def codegen(context, builder, sig, args):
        at = args[2]
        flags = [ir.Constant(I32, flag) for flag in (0, 0, 1)]  # to read, once and not to keep, data
        for _ in range(panels):
            address = emit_address(context, builder, sig.args[1], args[1], at, I8)
            emit_call(builder, "llvm.prefetch.p0", ir.VoidType(), address, *flags)
            at = builder.add(at, args[3])
        return context.get_dummy_value()

    return types.void(count, array, types.intp, types.intp), codegen


def _prefetch_line(doc, *flags):
    @intrinsic
    def prefetch(typing_context, array, index):
        def codegen(context, builder, sig, args):
            address = emit_address(context, builder, sig.args[0], args[0], args[1], I8)
            emit_call(builder, "llvm.prefetch.p0", ir.VoidType(), address, *(ir.Constant(I32, flag) for flag in flags))
            return context.get_dummy_value()

        return types.void(array, types.intp), codegen

    prefetch.__doc__ = doc
    return prefetch


# Flags: to read or to write; how long to keep, where 2 is not in the nearest cache but the one behind it; data.
prefetch_to_read = _prefetch_line("Ask for the cache line at a flat index, into the second cache.", 0, 2, 1)
prefetch_to_write = _prefetch_line("Ask for the cache line at a flat index, which will be written.", 1, 3, 1)


@intrinsic
def load_pairs(typing_context, count, array, index, stride):
    """A tile of `count` f32x16, the first at a flat index, two of each pair side by side, pairs `stride` apart."""
    tile = _tile(f32x16, _length(count))

    def codegen(context, builder, sig, args):
        places = _in_pairs(builder, args[2], args[3], tile.count, LANES)
        return context.make_tuple(
            builder, tile, [emit_load(context, builder, sig.args[1], args[1], at) for at in places]
        )

    return tile(count, array, types.intp, types.intp), codegen


@intrinsic
def load_scales(typing_context, count, array, index, stride):
    """The same for float16 numbers among the bytes of a weight stream; index and stride are bytes."""
    tile = _tile(f32x16, _length(count))

    def codegen(context, builder, sig, args):
        vectors, half = [], ir.VectorType(ir.IntType(16), LANES)
        for at in _in_pairs(builder, args[2], args[3], tile.count, 2 * LANES):
            bits = builder.load(emit_address(context, builder, sig.args[1], args[1], at, half), align=1)
            vectors.append(emit_widen(builder, types.int16, bits))
        return context.make_tuple(builder, tile, vectors)

    return tile(count, array, types.intp, types.intp), codegen


def _in_pairs(builder, index, stride, count, step):
    """Indices of so many panels: the second of a pair is `step` behind the first, the next pair `stride`."""
    places = []
    for p in range(count):
        places.append(builder.add(index, ir.Constant(index.type, p % 2 * step)))
        if p % 2 == 1:
            index = builder.add(index, stride)
    return places


@intrinsic
def fma_rows(typing_context, tile, panels, x, index, stride):
    """tile[r, p] + panels[p] · x[index + r·stride]: one step of a matrix product, for every row r and panel p.

    Where panels and x are words of two bfloat16, it is two steps.
    """
    is_pairs = bfloat16.is_pairs(x)

    def codegen(context, builder, sig, args):
        sums = list(cgutils.unpack_tuple(builder, args[0]))
        vectors = cgutils.unpack_tuple(builder, args[1])
        operands = [bfloat16.emit_operand(builder, vector) for vector in vectors] if is_pairs else vectors
        at = args[3]
        for row in range(len(sums) // len(vectors)):
            number = builder.load(emit_address(context, builder, x, args[2], at, I32 if is_pairs else F32))
            factor = number if is_pairs else emit_splat(builder, number)
            for p, operand in enumerate(operands):
                i = row * len(vectors) + p
                if is_pairs:
                    sums[i] = bfloat16.emit_dot(builder, sums[i], operand, factor)
                else:
                    sums[i] = emit_call(builder, "llvm.fma.v16f32", f32x16.llvm, operand, factor, sums[i])
            at = builder.add(at, args[4])
        return context.make_tuple(builder, sig.return_type, sums)

    return tile(tile, panels, x, types.intp, types.intp), codegen


@intrinsic
def scale_rows(typing_context, tile, panels, x):
    """tile[r, p] · x[r], for every row r and panel p."""
    per_row = _length(panels)

    def codegen(context, builder, sig, args):
        vectors = list(cgutils.unpack_tuple(builder, args[0]))
        for i, vector in enumerate(vectors):
            at = ir.Constant(ir.IntType(64), i // per_row)
            factor = builder.load(emit_address(context, builder, sig.args[2], args[2], at, F32))
            vectors[i] = builder.fmul(vector, emit_splat(builder, factor))
        return context.make_tuple(builder, tile, vectors)

    return tile(tile, panels, x), codegen


@intrinsic
def load_panels(typing_context, count, array, first, second, third, fourth):
    """A tile of two or four vectors from flat indices of their own: neighbours that live in different pages."""
    tile = _tile(loaded(array), _length(count))

    def codegen(context, builder, sig, args):
        places = args[2 : 2 + tile.count]
        return context.make_tuple(
            builder, tile, [emit_load(context, builder, sig.args[1], args[1], at) for at in places]
        )

    return tile(count, array, types.intp, types.intp, types.intp, types.intp), codegen


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
                place, left = builder.add(at, offset), builder.sub(args[5], offset)
                emit_store_first(context, builder, sig.args[0], args[0], place, vectors[r * per_row + p], left)
            at = builder.add(at, args[2])
        return context.get_dummy_value()

    return types.void(y, types.intp, types.intp, tile, panels, types.intp), codegen


# --- products of integers: dot_product.py says what one step is -------------------------------------------------------


@intrinsic
def start_rows(typing_context, rows, panels, q, starts, index, stride):
    """An i32x16 tile of each row's sums for q's activations: row r's last one holds starts[index + r·stride]."""
    sums, per_row = dot_product.sums_per_row(q), _length(panels)
    tile = _tile(i32x16, _length(rows) * sums * per_row)

    def codegen(context, builder, sig, args):
        at, vectors = args[4], []
        for _ in range(_length(rows)):
            pointer = emit_address(context, builder, sig.args[3], args[3], at, I32)
            vectors += [emit_constant(0, i32x16)] * (per_row * (sums - 1))
            vectors += [emit_splat(builder, builder.load(pointer))] * per_row
            at = builder.add(at, args[5])
        return context.make_tuple(builder, tile, vectors)

    return tile(rows, panels, q, starts, types.intp, types.intp), codegen


@intrinsic
def inputs_per_load(typing_context, w):
    """How many inputs of 16 outputs are in 64 bytes of w."""
    inputs = 4 if w.dtype == types.int8 else 8
    return types.intp(w), lambda context, builder, sig, args: ir.Constant(ir.IntType(64), inputs)


@intrinsic
def begin_part(typing_context, sums, w, q):
    """The tile that 32 inputs are added to: the sums themselves, or 16-bit zeros where that is faster."""
    narrow = dot_product.sums_in_16_bits(w, q)
    part = _tile(i16x32, sums.count) if narrow else sums

    def codegen(context, builder, sig, args):
        return context.make_tuple(builder, part, [emit_constant(0, i16x32)] * part.count) if narrow else args[0]

    return part(sums, w, q), codegen


@intrinsic
def end_part(typing_context, sums, part):
    """The sums with those 32 inputs."""

    def codegen(context, builder, sig, args):
        if sums == part:
            return args[1]
        pairs = zip(*(cgutils.unpack_tuple(builder, tile) for tile in args), strict=True)
        return context.make_tuple(builder, sums, [dot_product.emit_end(builder, *pair) for pair in pairs])

    return sums(sums, part), codegen


@intrinsic
def dot_rows(typing_context, tile, panels, w, w_index, w_stride, q, index, stride):
    """tile[r, p] + the products of 64 bytes of w's panel p with the same inputs of row r of q.

    `panels` is a literal; the two panels of a pair have their 64 bytes side by side, the first at w_index, the next
    pair w_stride bytes on; a row's activations are at index + r·stride.
    """
    count, sums = _length(panels), dot_product.sums_per_row(q)
    words = 1 if q.dtype == types.int8 else 2  # of 32 bits, for four inputs

    def codegen(context, builder, sig, args):
        totals = list(cgutils.unpack_tuple(builder, args[0]))
        operands = []
        for at in _in_pairs(builder, args[3], args[4], count, 64):
            pointer = emit_address(context, builder, sig.args[2], args[2], at, i8x64.llvm)
            unpacked = dot_product.emit_unpack(builder, w, builder.load(pointer, align=1))
            operands.append([dot_product.emit_widen(builder, w, q, operand) for operand in unpacked])
        steps = len(operands[0])
        at = args[6]
        for row in range(len(totals) // (count * sums)):
            address = emit_address(context, builder, sig.args[5], args[5], at, I32)
            for step in range(steps):
                inputs = [
                    emit_splat(
                        builder, builder.load(builder.gep(address, [ir.Constant(I32, step * words + i)]), align=1)
                    )
                    for i in range(words)
                ]
                for p in range(count):
                    places = [(row * sums + digit) * count + p for digit in range(sums)]
                    old = [totals[place] for place in places]
                    new = dot_product.emit_dot(builder, w, q, old, operands[p][step], inputs)
                    for place, total in zip(places, new, strict=True):
                        totals[place] = total
            at = builder.add(at, args[7])
        return context.make_tuple(builder, sig.return_type, totals)

    return tile(tile, panels, w, types.intp, types.intp, q, types.intp, types.intp), codegen


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
        digits = len(integers) // len(totals)
        for r in range(rows):
            pointer = emit_address(context, builder, sig.args[3], args[3], at, F32)
            scale = emit_splat(builder, builder.load(pointer))
            for p in range(count):
                value = integers[r * digits * count + p]
                if digits == 2:
                    low = integers[(2 * r + 1) * count + p]
                    value = builder.add(builder.shl(value, emit_constant(8, i32x16)), low)
                both = builder.fmul(w_scales[p], scale)
                i = r * count + p
                converted = builder.sitofp(value, f32x16.llvm)
                totals[i] = emit_call(builder, "llvm.fma.v16f32", f32x16.llvm, converted, both, totals[i])
            at = builder.add(at, args[5])
        return context.make_tuple(builder, sig.return_type, totals)

    return tile(tile, sums, panels, x_scale, types.intp, types.intp), codegen
