"""The products of a mixture's experts in one pass: each expert's rows with its own matrix, shared out together.

Knows nothing of routing (moe.py), nor how a product is computed (matmul.py): a block of one has the same bits here and
there. Rows lie expert by expert, and the experts' matrices one above the other, as one packed matrix.
"""

import numpy as np
from numba import prange

from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.matmul import CHUNK, FINE, float_block, integer_block, prepare_row, room_for_rows
from tinyserve.tensor.norm import norm_row
from tinyserve.tensor.quant import BLOCK, PANEL

SLICES = 4  # of an expert's outputs: threads share out one slice of all experts after the other
# What is known of a chunk of rows: whose it is, its first row, how many there are; its expert's chunks begin after
# BEFORE others, and are SIBLINGS.
EXPERT, FIRST, ROWS, BEFORE, SIBLINGS = range(5)


@kernel
def _chunks(offsets):
    """A line for each chunk of each expert's rows, (chunks, 5)."""
    chunks, count = np.empty((offsets.size - 1 + offsets[-1] // CHUNK, 5), np.int64), 0
    for expert in range(offsets.size - 1):
        before, siblings = count, (offsets[expert + 1] - offsets[expert] + CHUNK - 1) // CHUNK
        for first in range(offsets[expert], offsets[expert + 1], CHUNK):
            chunks[count, EXPERT], chunks[count, FIRST] = expert, first
            chunks[count, ROWS] = min(CHUNK, offsets[expert + 1] - first)
            chunks[count, BEFORE], chunks[count, SIBLINGS] = before, siblings
            count += 1
    return chunks[:count]


@kernel
def _place(item, chunks, panels, experts, w):
    """An item's first row, its number of rows, its first panel of the outputs, and of w.

    Slice by slice, in it expert by expert, in that block by block of outputs, and for each block the expert's chunks:
    threads take neighbouring items, so they have an equal share of every expert, however many rows one has, and a
    block of weights passes over all rows that it meets.
    """
    blocks = w.shape[0] // experts // panels
    # A token that is decoded has a row for each expert: they are alike, and weights are read from end to end.
    in_slice = blocks if panels == FINE else (blocks + SLICES - 1) // SLICES
    begin = item // (in_slice * len(chunks)) * in_slice
    in_slice, item = min(in_slice, blocks - begin), item - begin * len(chunks)
    of_expert = chunks[item // in_slice]
    item -= of_expert[BEFORE] * in_slice
    chunk = chunks[of_expert[BEFORE] + item % of_expert[SIBLINGS]]
    panel = (begin + item // of_expert[SIBLINGS]) * panels
    return chunk[FIRST], chunk[ROWS], panel, chunk[EXPERT] * blocks * panels + panel


@kernel
def _float_item(item, chunks, panels, experts, h, w, y, bias, scale, activation, residual):
    first, rows, panel, w_panel = _place(item, chunks, panels, experts, w)
    float_block(w_panel, panel, panels, first, rows, h, w, y, bias, scale, activation, residual)


@kernel
def _integer_item(
    item, chunks, panels, experts, q, starts, x_scales, x_sums, w, w_scales, minimums, y, bias, scale, activation,
    residual,
):  # fmt: skip
    first, rows, panel, w_panel = _place(item, chunks, panels, experts, w)
    integer_block(
        w_panel, panel, panels, first, rows, q, starts, x_scales, x_sums, w, w_scales, minimums, y, bias, scale,
        activation, residual,
    )  # fmt: skip


@parallel_kernel
def grouped_matmul_float(x, norm, norm_weight, norm_bias, eps, offsets, w, width, scale, activation):
    """matmul_float of each expert's rows of x (M, K), which are offsets[e] .. offsets[e + 1], with its part of w.

    offsets (experts + 1,) int64 from 0 to M; w (experts · N/16, K, 16) packed, N a multiple of BLOCK. -> (M, width).
    """
    M, experts = x.shape[0], offsets.size - 1
    h = x
    if norm:
        h = np.empty(x.shape, np.float32)
        for m in prange(M):
            norm_row(x, norm, norm_weight, norm_bias, eps, h, np.int64(m))
    y = np.empty((M, width), np.float32)
    bias, residual = np.empty(0, np.float32), np.empty((0, 0), np.float32)
    chunks = _chunks(offsets)
    panels = FINE if len(chunks) == M else BLOCK // PANEL
    for item in prange(len(chunks) * (w.shape[0] // experts // panels)):
        _float_item(np.int64(item), chunks, panels, experts, h, w, y, bias, scale, activation, residual)
    return y


@parallel_kernel
def grouped_matmul_integer(
    x, norm, norm_weight, norm_bias, eps, kind, largest, zero, offsets, w, w_scales, minimums, width, scale, activation
):
    """The same for matmul_integer."""
    M, experts = x.shape[0], offsets.size - 1
    group, q, starts, x_scales, x_sums = room_for_rows(M, kind, w, w_scales)
    for m in prange(M):
        prepare_row(
            x, norm, norm_weight, norm_bias, eps, np.int64(m), q, starts, x_scales, x_sums, group, largest, zero
        )
    y = np.empty((M, width), np.float32)
    bias, residual = np.empty(0, np.float32), np.empty((0, 0), np.float32)
    chunks = _chunks(offsets)
    panels = FINE if len(chunks) == M else BLOCK // PANEL
    for item in prange(len(chunks) * (w.shape[0] // experts // panels)):
        _integer_item(
            np.int64(item), chunks, panels, experts, q, starts, x_scales, x_sums, w, w_scales, minimums, y, bias,
            scale, activation, residual,
        )  # fmt: skip
    return y
