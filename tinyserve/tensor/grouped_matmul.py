"""The products of a mixture's experts in one pass: each expert's rows with its own matrix, shared out together.

Knows nothing of routing (moe.py), nor how a product is computed (matmul.py): a block of one has the same bits here and
there. Rows lie expert by expert, and the experts' matrices one above the other, as one packed matrix.
"""

import numpy as np

from tinyserve.tensor._jit import kernel
from tinyserve.tensor.matmul import (
    CHUNK,
    NOTHING,
    Block,
    Epilogue,
    float_block,
    integer_block,
    quantized_rows,
)
from tinyserve.tensor.norm import Norm, norm_rows
from tinyserve.tensor.program import empty, instruction, num_threads
from tinyserve.tensor.quant import BLOCK, PANEL, IntegerWeights, Rounding
from tinyserve.tensor.thread_pool import next_items

Array = np.ndarray

SLICES = 4  # of an expert's outputs: threads share out one slice of all experts after the other
# What is known of a chunk of rows: whose it is, its first row, how many there are; its expert's chunks begin after
# BEFORE others, and are SIBLINGS.
EXPERT, FIRST, ROWS, BEFORE, SIBLINGS = range(5)


@kernel
def _chunks(offsets, chunks):
    """Write a line for each chunk of each expert's rows; returns how many there are."""
    count = 0
    for expert in range(offsets.size - 1):
        before, siblings = count, (offsets[expert + 1] - offsets[expert] + CHUNK - 1) // CHUNK
        for first in range(offsets[expert], offsets[expert + 1], CHUNK):
            chunks[count, EXPERT], chunks[count, FIRST] = expert, first
            chunks[count, ROWS] = min(CHUNK, offsets[expert + 1] - first)
            chunks[count, BEFORE], chunks[count, SIBLINGS] = before, siblings
            count += 1
    return count


@kernel
def _place(item, chunks, count, panels, of_expert):
    """An item's block.

    Slice by slice, in it expert by expert, in that block by block of outputs, and for each block the expert's chunks:
    threads take neighbouring items, so they have an equal share of every expert, however many rows one has, and a
    block of weights passes over all rows that it meets. An expert has `of_expert` panels.
    """
    blocks = of_expert // panels
    # A token that is decoded has a row for each expert: they are alike, and weights are read from end to end.
    in_slice = blocks if panels == 2 else (blocks + SLICES - 1) // SLICES
    begin = item // (in_slice * count) * in_slice
    in_slice, item = min(in_slice, blocks - begin), item - begin * count
    first = chunks[item // in_slice]
    item -= first[BEFORE] * in_slice
    which, panel = item % first[SIBLINGS], (begin + item // first[SIBLINGS]) * panels
    chunk = chunks[first[BEFORE] + which]
    w_panel = chunk[EXPERT] * of_expert + panel
    return Block(chunk[FIRST], chunk[ROWS], panel, w_panel, panels, which, first[SIBLINGS])


@instruction
def _grouped_matmul_float(team, offsets, chunks, h, w, after, residual, y):
    mine = chunks[team.thread]
    count, of_expert = _chunks(offsets, mine), 2 * w.shape[0] // (offsets.size - 1)
    panels = 2 if count == y.shape[0] else BLOCK // PANEL
    items = count * (of_expert // panels)
    first, last = next_items(team, items)
    while first < last:
        for item in range(first, last):
            float_block(h, w, _place(item, mine, count, panels, of_expert), after, residual, y)
        first, last = next_items(team, items)


@instruction
def _grouped_matmul_integer(team, offsets, chunks, quantized, w, after, residual, y):
    mine = chunks[team.thread]
    count, of_expert = _chunks(offsets, mine), 2 * w.stream.shape[0] // (offsets.size - 1)
    panels = 2 if count == y.shape[0] else BLOCK // PANEL
    items = count * (of_expert // panels)
    first, last = next_items(team, items)
    while first < last:
        for item in range(first, last):
            integer_block(quantized, w, _place(item, mine, count, panels, of_expert), after, residual, y)
        first, last = next_items(team, items)


def grouped_matmul_float(x: Array, norm: Norm, offsets: Array, w: Array, after: Epilogue, width: int) -> Array:
    """matmul_float of each expert's rows of x (M, K), which are offsets[e] .. offsets[e + 1], with its part of w.

    offsets (experts + 1,) int64 from 0 to M; w (experts · N/32, K, 32) packed, N a multiple of BLOCK. -> (M, width).
    """
    h = norm_rows(x, norm) if norm.kind else x
    y = empty((len(x), width))
    _grouped_matmul_float(offsets, _room_for_chunks(offsets, len(x)), h, w, after, NOTHING, y)
    return y


def grouped_matmul_integer(
    x: Array, norm: Norm, rounding: Rounding, offsets: Array, w: IntegerWeights, after: Epilogue, width: int
) -> Array:
    """The same for matmul_integer."""
    quantized = quantized_rows(x, norm, rounding, w)
    y = empty((len(x), width))
    _grouped_matmul_integer(offsets, _room_for_chunks(offsets, len(x)), quantized, w, after, NOTHING, y)
    return y


def _room_for_chunks(offsets: Array, rows: int) -> Array:
    """Each thread lists the chunks for itself: there are at most so many."""
    return empty((num_threads(), len(offsets) - 1 + rows // CHUNK, 5), np.int64)
