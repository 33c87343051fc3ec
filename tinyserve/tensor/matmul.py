"""Matrix products y = x · Wᵀ for every way of keeping W, with what comes before and after in the same pass.

Letters: M tokens, N outputs, K inputs; W is packed in pairs of panels of 16 outputs (tensor/quant.py). Before the
product a row may be normalised, and it is quantized if the weights are; after it come bias, scale, activation and
residual, while the numbers are still in the nearest cache. A register tile is a few rows of x by a few panels; every
row sums its K inputs in the same order whatever tile it is computed in, so a token's numbers do not depend on who else
is there.
"""

from typing import NamedTuple

import numpy as np

from tinyserve.tensor._jit import kernel
from tinyserve.tensor.activation import gelu_tanh_vector, gelu_vector, silu_vector
from tinyserve.tensor.native import stack_array
from tinyserve.tensor.norm import Norm, norm_row, norm_rows
from tinyserve.tensor.program import constant, empty, instruction, num_threads
from tinyserve.tensor.quant import BLOCK, PAIR, PANEL, IntegerWeights, Rounding, quantize_row
from tinyserve.tensor.simd import LANES, WIDE, load, load_first, splat, store_first
from tinyserve.tensor.thread_pool import next_items, own_items
from tinyserve.tensor.tiles import (
    PANELS,
    begin_part,
    dot_rows,
    end_part,
    fma_rows,
    inputs_per_load,
    load_pairs,
    load_scales,
    prefetch_to_read,
    prefetch_to_write,
    scaled_rows,
    start_rows,
    store_rows,
    zeros,
)

Array = np.ndarray

APART = 16  # rows from one thread's to the next: neither writes into cache lines that the other reads
CHUNK = 48  # rows of x that stay in the cache while a block of weights passes over them
MANY_ROWS = 128  # for each thread, for which weights are read by all threads
PRODUCTS = CHUNK * BLOCK  # of such a block, before the epilogue
FLOAT_ROWS, FLOAT_PANELS = 6, 4 if WIDE else 1
PLAIN, SILU_MUL, GELU, GELU_TANH = 0, 1, 2, 3  # what is done with a product; the second makes one number of two


@constant
class Epilogue(NamedTuple):
    """What follows a product, before a residual is added: activation(scale · (product + bias)).

    bias (N,) or empty; activation PLAIN, GELU, GELU_TANH, or SILU_MUL, which makes one number of two: of W's panels the
    even ones are gates, each followed by what it lets through.
    """

    bias: Array
    scale: np.float32
    activation: int


NOTHING = np.empty((0, 0), np.float32)  # to add to a product


class QuantizedRows(NamedTuple):
    """Rows of x as integers, in groups of inputs that share a scale (quant.quantize_row)."""

    q: Array  # (rows, K padded) int8 or int16
    starts: Array  # (rows, groups) int32
    scales: Array  # (rows, groups) float32
    sums: Array  # (rows, groups) float32


# --- register tiles ---------------------------------------------------------------------------------------------------


def _float_tile(ROWS, PANELS):
    """A kernel for ROWS rows by some panels of outputs, into rows of `out`, BLOCK wide."""
    SIZE = ROWS * PANELS

    @kernel
    def tile(x, m, w, first_panel, panels, out, at):
        K = w.shape[1]
        for p in range(0, panels, PANELS):
            total = zeros(SIZE)
            panel = first_panel + p
            w_at = (panel // 2 * K * 2 + panel % 2) * PANEL
            for k in range(K):
                weights = load_pairs(PANELS, w, w_at + k * PAIR, K * PAIR)
                total = fma_rows(total, weights, x, m * K + k, K)
            store_rows(out, at + p * PANEL, BLOCK, total, PANELS, BLOCK)

    return tile


_float_tile_1, _float_tile_n = _float_tile(1, 2), _float_tile(FLOAT_ROWS, FLOAT_PANELS)


def _integer_tile(ROWS, PANELS):
    """The same for quantized weights and activations of every kind: their types say which."""
    SIZE = ROWS * PANELS

    @kernel
    def tile(rows, m, w, first_panel, panels, out, at):
        stream, group = w.stream, w.group
        groups, size = stream.shape[1], stream.shape[2]
        inputs = inputs_per_load(stream)
        header = (1 + w.has_minimums) * 2 * PAIR
        K, pair = groups * group, groups * size
        for p in range(0, panels, PANELS):
            total = zeros(SIZE)
            panel = first_panel + p
            scales_at = panel // 2 * pair + panel % 2 * 2 * PANEL
            w_at = panel // 2 * pair + panel % 2 * 4 * PANEL + header
            for g in range(groups):
                sums = start_rows(ROWS, PANELS, rows.q, rows.starts, m * groups + g, groups)
                for k in range(0, group, 32):
                    part = begin_part(sums, stream, rows.q)
                    for i in range(k, k + 32, inputs):
                        here = w_at + 4 * PAIR * (i // inputs)
                        part = dot_rows(part, PANELS, stream, here, pair, rows.q, m * K + g * group + i, K)
                    sums = end_part(sums, part)
                scales = load_scales(PANELS, stream, scales_at, pair)
                total = scaled_rows(total, sums, scales, rows.scales, m * groups + g, groups)
                if w.has_minimums:
                    offsets = load_scales(PANELS, stream, scales_at + 2 * PAIR, pair)
                    total = fma_rows(total, offsets, rows.sums, m * groups + g, groups)
                scales_at += size
                w_at += size
            store_rows(out, at + p * PANEL, BLOCK, total, PANELS, BLOCK)

    return tile


_integer_tile_1, _integer_tile_3 = _integer_tile(1, 2), _integer_tile(3, PANELS)


# --- what comes after -------------------------------------------------------------------------------------------------


@kernel
def _outputs(width, activation):
    """How many rows of W make `width` numbers: gates and what they let through alternate, a panel each."""
    return (width + PANEL - 1) // PANEL * PANEL * 2 if activation == SILU_MUL else width


@kernel
def _finish(product, rows, y, m, n, outputs, after, residual):
    """The epilogue of some outputs from n on, and what is added to them, into y[m : m + rows]."""
    width = y.shape[1]
    N = _outputs(width, after.activation)
    scale = splat(after.scale)
    for r in range(rows):
        for i in range(0, min(outputs, N - n), LANES):
            v = load(product, r * BLOCK + i)
            at, left = n + i, N - n - i
            if after.bias.size:
                v = v + load_first(after.bias, at, left)
            v = v * scale
            if after.activation == SILU_MUL:
                if i // LANES % 2 == 0:
                    continue  # a panel of gates: the next one, what they let through, takes them along
                gate = load(product, r * BLOCK + i - LANES)
                if after.bias.size:
                    gate = gate + load_first(after.bias, at - LANES, left + LANES)
                v = silu_vector(gate * scale) * v
                at = (at - LANES) // 2
                left = width - at
            elif after.activation == GELU:
                v = gelu_vector(v)
            elif after.activation == GELU_TANH:
                v = gelu_tanh_vector(v)
            if residual.size:
                v = load_first(residual, (m + r) * width + at, left) + v
            store_first(y, (m + r) * width + at, v, left)


@kernel
def _ask_for(y, m, rows, n, outputs, after, residual):
    """Ask for the lines that _finish will read and write: a row's are far from the next row's."""
    if after.activation == SILU_MUL:
        n, outputs = n // 2, outputs // 2
    for row in range(m, m + rows):
        for at in range(row * y.shape[1] + n, row * y.shape[1] + n + outputs, LANES):
            prefetch_to_write(y, at)
            if residual.size:
                prefetch_to_read(residual, at)


# --- blocks: some rows by some panels ---------------------------------------------------------------------------------


class Block(NamedTuple):
    """A chunk of rows by some panels of outputs: an item of work."""

    row: int  # the first, of x and of y
    rows: int
    panel: int  # the first, of y
    w_panel: int  # and of w
    panels: int
    chunk: int  # of the chunks that these panels pass over, one after the other
    chunks: int


@kernel
def float_block(h, w, block, after, residual, y):
    """The product of a block, and what follows it."""
    product = stack_array(PRODUCTS, np.float32)
    rows, n, outputs = block.rows, block.panel * PANEL, block.panels * PANEL
    r = 0
    while rows >= FLOAT_ROWS and r < rows:
        r = min(r, rows - FLOAT_ROWS)  # the last tile does some rows again: they come to the same
        _ask_for(y, block.row + r, FLOAT_ROWS, n, outputs, after, residual)
        _float_tile_n(h, block.row + r, w, block.w_panel, block.panels, product, r * BLOCK)
        r += FLOAT_ROWS
    while r < rows:
        _float_tile_1(h, block.row + r, w, block.w_panel, block.panels, product, r * BLOCK)
        r += 1
    _finish(product, rows, y, block.row, n, outputs, after, residual)


@kernel
def integer_block(quantized, w, block, after, residual, y):
    """The same for integers. Meanwhile memory is asked for the panels behind these, a part of them by each chunk."""
    product = stack_array(PRODUCTS, np.float32)
    rows, n, outputs = block.rows, block.panel * PANEL, block.panels * PANEL
    pair = w.stream.shape[1] * w.stream.shape[2]
    behind, size = (block.w_panel + block.panels) // 2 * pair, block.panels // 2 * pair
    asked = behind + size * block.chunk // block.chunks
    r = 0
    while rows >= 3 and r < rows:
        r = min(r, rows - 3)  # the last tile does some rows again: they come to the same
        _ask_for(y, block.row + r, 3, n, outputs, after, residual)
        _integer_tile_3(quantized, block.row + r, w, block.w_panel, block.panels, product, r * BLOCK)
        r += 3
        ask = behind + size * (block.chunk * rows + r) // (block.chunks * rows)
        while asked < min(ask, w.stream.size):
            prefetch_to_read(w.stream, asked)
            asked += 64
    while r < rows:
        _integer_tile_1(quantized, block.row + r, w, block.w_panel, block.panels, product, r * BLOCK)
        r += 1
    _finish(product, rows, y, block.row, n, outputs, after, residual)


# --- instructions -----------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """The items of a product: for each part of the rows, block by block of outputs, all chunks of that part's rows."""

    parts: int
    blocks: int
    chunks: int


@kernel
def _cut(team, M, blocks):
    """Of many rows each thread has a part, whose numbers stay in its caches from one instruction to the next; else all
    rows are one part, so that each weight is read by one thread.
    """
    parts = team.threads if MANY_ROWS * team.threads <= M else 1
    return Cut(parts, blocks, (M + parts * CHUNK - 1) // (parts * CHUNK))


@kernel
def _place(cut, M, panels, item):
    """An item's block, which may be without rows."""
    part, item = item // (cut.blocks * cut.chunks), item % (cut.blocks * cut.chunks)
    chunk, panel = item % cut.chunks, item // cut.chunks * panels
    row = part * M // cut.parts + chunk * CHUNK
    rows = min(CHUNK, (part + 1) * M // cut.parts - row)
    return Block(row, rows, panel, panel, panels, chunk, cut.chunks)


@instruction
def _matmul_float(team, x, norm, h, w, after, residual, y):
    M = y.shape[0]
    if M == 1 and norm.kind:  # cheaper for each thread to do than to wait for
        row = team.thread * APART
        norm_row(x, 0, norm, h, row)
        first, last = next_items(team, w.shape[0])
        product = stack_array(BLOCK, np.float32)
        while first < last:
            for pair in range(first, last):
                _float_tile_1(h, row, w, 2 * pair, 2, product, 0)
                _finish(product, 1, y, 0, pair * PAIR, PAIR, after, residual)
            first, last = next_items(team, w.shape[0])
        return
    panels = 2 if M == 1 else BLOCK // PANEL
    cut = _cut(team, M, 2 * w.shape[0] // panels)
    count = cut.parts * cut.blocks * cut.chunks
    first, last = next_items(team, count)
    while first < last:
        for item in range(first, last):
            float_block(h, w, _place(cut, M, panels, item), after, residual, y)
        first, last = next_items(team, count)


@instruction
def _quantize_rows(team, x, norm, rounding, h, quantized):
    first, last = own_items(team, x.shape[0])
    for m in range(first, last):
        _quantize(x, m, norm, rounding, h, team.thread * APART, quantized, m)


@kernel
def _quantize(x, m, norm, rounding, h, scratch, quantized, row):
    """Row m of x, normalised and quantized; h is what threads normalise into, each from a row of its own."""
    if norm.kind:
        norm_row(x, m, norm, h, scratch)
        quantize_row(h, scratch, quantized, row, rounding)
    else:
        quantize_row(x, m, quantized, row, rounding)


@instruction
def _matmul_integer_row(team, x, norm, rounding, h, quantized, w, after, residual, y):
    """One row: it is cheaper for each thread to quantize it than to wait for."""
    row = team.thread * APART
    _quantize(x, 0, norm, rounding, h, row, quantized, row)
    product = stack_array(BLOCK, np.float32)
    first, last = next_items(team, w.stream.shape[0])
    while first < last:
        for pair in range(first, last):
            _integer_tile_1(quantized, row, w, 2 * pair, 2, product, 0)
            _finish(product, 1, y, 0, pair * PAIR, PAIR, after, residual)
        first, last = next_items(team, w.stream.shape[0])


@instruction
def _matmul_integer(team, quantized, w, after, residual, y):
    M, panels = y.shape[0], BLOCK // PANEL
    cut = _cut(team, M, 2 * w.stream.shape[0] // panels)
    count = cut.parts * cut.blocks * cut.chunks
    first, last = next_items(team, count)
    while first < last:
        for item in range(first, last):
            integer_block(quantized, w, _place(cut, M, panels, item), after, residual, y)
        first, last = next_items(team, count)


# --- for Python -------------------------------------------------------------------------------------------------------


def matmul_float(x: Array, norm: Norm, w: Array, after: Epilogue, residual: Array, width: int) -> Array:
    """activation(scale · (norm(x) · Wᵀ + bias)) + residual, for W in float32 or bfloat16.

    x (M, K) float32, w as `quant.pack_float` packs it, residual (M, width) or NOTHING -> y (M, width) float32.
    """
    y = empty((x.shape[0], width))
    _matmul_float(x, norm, normed_rows(x, norm), w, after, residual, y)
    return y


def normed_rows(x: Array, norm: Norm) -> Array:
    """norm(x), as `_matmul_float` wants it: for one row, room for each thread's own."""
    M, K = x.shape
    if not norm.kind:
        return x
    if M == 1:
        return empty((num_threads() * APART, K))
    return norm_rows(x, norm)


def matmul_integer(
    x: Array, norm: Norm, rounding: Rounding, w: IntegerWeights, after: Epilogue, residual: Array, width: int
) -> Array:
    """The same for W in 8 or 4 bits, and x rounded to 16 or 8."""
    M = x.shape[0]
    y = empty((M, width))
    if M == 1:
        h, quantized = _room(num_threads() * APART, x, rounding, w)
        _matmul_integer_row(x, norm, rounding.numbers, h, quantized, w, after, residual, y)
    else:
        _matmul_integer(quantized_rows(x, norm, rounding, w), w, after, residual, y)
    return y


def quantized_rows(x: Array, norm: Norm, rounding: Rounding, w: IntegerWeights) -> QuantizedRows:
    """The rows of norm(x), rounded to integers."""
    h, quantized = _room(x.shape[0], x, rounding, w)
    _quantize_rows(x, norm, rounding.numbers, h, quantized)
    return quantized


def _room(rows: int, x: Array, rounding: Rounding, w: IntegerWeights) -> tuple[Array, QuantizedRows]:
    """Memory for rows that are normalised, one a thread and APART, and for quantized ones."""
    groups = w.stream.shape[1]
    quantized = QuantizedRows(
        empty((rows, groups * w.group), rounding.dtype),
        empty((rows, groups), np.int32),
        empty((rows, groups)),
        empty((rows, groups)),
    )
    return empty((num_threads() * APART, x.shape[1])), quantized
