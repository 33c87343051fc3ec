"""Matrix products y = x · Wᵀ for every way of keeping W, with what comes before and after in the same pass.

Letters: M tokens, N outputs, K inputs; W is packed in panels of 16 outputs (tensor/quant.py). Before the product a row
may be normalised, and it is quantized if the weights are; after it come bias, scale, activation and residual, while
the numbers are still in the nearest cache. A register tile is a few rows of x by a few panels; every row sums its K
inputs in the same order whatever tile it is computed in, so a token's numbers do not depend on who else is there.
"""

import numpy as np
from numba import prange

from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.activation import gelu_tanh_vector, gelu_vector, silu_vector
from tinyserve.tensor.norm import norm_row
from tinyserve.tensor.quant import BLOCK, PANEL, quantize_row
from tinyserve.tensor.simd import LANES, WIDE, load, load_first, splat, store_first
from tinyserve.tensor.tiles import (
    PANELS,
    begin_part,
    dot_rows,
    end_part,
    fma_rows,
    inputs_per_load,
    load_tile,
    prefetch_panels,
    scaled_rows,
    start_rows,
    store_rows,
    zeros,
)

# What a single row asks for ahead of its use: bytes of each panel's weights, and groups of its scales.
BYTES_AHEAD, GROUPS_AHEAD = 2048, 8
FINE = 2  # panels of a work item for a single row, where a block would leave a thread waiting for another's last
CHUNK = 48  # rows of x that stay in the cache while a block of weights passes over them
FLOAT_ROWS, FLOAT_PANELS = 6, 4 if WIDE else 1
PLAIN, SILU_MUL, GELU, GELU_TANH = 0, 1, 2, 3  # what is done with a product; the second makes one number of two


def _float_tile(ROWS, PANELS):
    """A kernel for ROWS rows by some panels of outputs, into rows of `out`, BLOCK wide."""
    SIZE = ROWS * PANELS

    @kernel
    def tile(x, m, w, first_panel, panels, out, at):
        K = w.shape[1]
        panel = PANEL * K
        for p in range(0, panels, PANELS):
            total = zeros(SIZE)
            w_at = (first_panel + p) * panel
            for k in range(K):
                weights = load_tile(PANELS, w, w_at + k * PANEL, panel)
                total = fma_rows(total, weights, x, m * K + k, K)
            store_rows(out, at + p * PANEL, BLOCK, total, PANELS, BLOCK)

    return tile


_float_tile_1, _float_tile_n = _float_tile(1, FINE), _float_tile(FLOAT_ROWS, FLOAT_PANELS)


@kernel
def _ahead(place, length, panels):
    """A place in each of some panels, one behind the other; whoever is past their ends is in the panels after them."""
    return place if place < length else place + (panels - 1) * length


def _integer_tile(ROWS, PANELS):
    """The same for quantized weights and activations of every kind: their types say which."""
    SIZE = ROWS * PANELS

    @kernel
    def tile(q, starts, x_scales, x_sums, m, w, w_scales, minimums, first_panel, panels, out, at):
        groups = w_scales.shape[1]
        inputs = inputs_per_load(w)
        group = w.shape[1] // groups * inputs
        K = groups * group
        w_stride, scale_stride = 4 * PANEL * w.shape[1], PANEL * groups
        for p in range(0, panels, PANELS):
            total = zeros(SIZE)
            w_at, scales_at = (first_panel + p) * w_stride, (first_panel + p) * scale_stride
            for g in range(groups):
                if ROWS == 1:
                    there = scales_at + PANEL * _ahead(g + GROUPS_AHEAD, groups, PANELS)
                    prefetch_panels(PANELS, w_scales, there, scale_stride)
                    if minimums.size:
                        prefetch_panels(PANELS, minimums, there, scale_stride)
                sums = start_rows(ROWS, PANELS, q, starts, m * groups + g, groups)
                for k in range(g * group, (g + 1) * group, 32):
                    part = begin_part(sums, w, q)
                    for i in range(k, k + 32, inputs):
                        if ROWS == 1:
                            there = w_at + _ahead(4 * PANEL * (i // inputs) + BYTES_AHEAD, w_stride, PANELS)
                            prefetch_panels(PANELS, w, there, w_stride)
                        part = dot_rows(part, PANELS, w, w_at + 4 * PANEL * (i // inputs), w_stride, q, m * K + i, K)
                    sums = end_part(sums, part)
                scales = load_tile(PANELS, w_scales, scales_at + g * PANEL, scale_stride)
                total = scaled_rows(total, sums, scales, x_scales, m * groups + g, groups)
                if minimums.size:
                    offsets = load_tile(PANELS, minimums, scales_at + g * PANEL, scale_stride)
                    total = fma_rows(total, offsets, x_sums, m * groups + g, groups)
            store_rows(out, at + p * PANEL, BLOCK, total, PANELS, BLOCK)

    return tile


_integer_tile_1, _integer_tile_3 = _integer_tile(1, min(PANELS, FINE)), _integer_tile(3, PANELS)


@kernel
def _outputs(width, activation):
    """How many rows of W make `width` numbers: gates and what they let through alternate, a panel each."""
    return (width + PANEL - 1) // PANEL * PANEL * 2 if activation == SILU_MUL else width


@kernel
def _finish(product, rows, y, m, n, outputs, bias, scale, activation, residual):
    """activation(scale · (product + bias)) + residual of some outputs from n on, into y[m : m + rows]."""
    width = y.shape[1]
    N = _outputs(width, activation)
    for r in range(rows):
        for i in range(0, min(outputs, N - n), LANES):
            v = load(product, r * BLOCK + i)
            at, left = n + i, N - n - i
            if bias.size:
                v = v + load_first(bias, at, left)
            v = v * splat(scale)
            if activation == SILU_MUL:
                if i // LANES % 2 == 0:
                    continue  # a panel of gates: the next one, what they let through, takes them along
                gate = load(product, r * BLOCK + i - LANES)
                if bias.size:
                    gate = gate + load_first(bias, at - LANES, left + LANES)
                v = silu_vector(gate * splat(scale)) * v
                at = (at - LANES) // 2
                left = width - at
            elif activation == GELU:
                v = gelu_vector(v)
            elif activation == GELU_TANH:
                v = gelu_tanh_vector(v)
            if residual.size:
                v = load_first(residual, (m + r) * width + at, left) + v
            store_first(y, (m + r) * width + at, v, left)


@kernel
def _float_item(item, chunks, panels, h, w, y, bias, scale, activation, residual):
    """A chunk of rows by some panels of outputs."""
    panel, first = item // chunks * panels, item % chunks * CHUNK
    rows = min(CHUNK, h.shape[0] - first)
    float_block(panel, panel, panels, first, rows, h, w, y, bias, scale, activation, residual)


@kernel
def float_block(w_panel, panel, panels, first, rows, h, w, y, bias, scale, activation, residual):
    """Rows first .. first + rows by `panels` panels of w from w_panel on, which are y's from `panel` on."""
    product = np.empty(rows * BLOCK, np.float32)
    r = 0
    while rows >= FLOAT_ROWS and r < rows:
        r = min(r, rows - FLOAT_ROWS)  # the last tile does some rows again: they come to the same
        _float_tile_n(h, first + r, w, w_panel, panels, product, r * BLOCK)
        r += FLOAT_ROWS
    while r < rows:
        _float_tile_1(h, first + r, w, w_panel, panels, product, r * BLOCK)
        r += 1
    _finish(product, rows, y, first, panel * PANEL, panels * PANEL, bias, scale, activation, residual)


@kernel
def _integer_item(
    item, chunks, panels, q, starts, x_scales, x_sums, w, w_scales, minimums, y, bias, scale, activation, residual
):
    """The same for integers."""
    panel, first = item // chunks * panels, item % chunks * CHUNK
    rows = min(CHUNK, q.shape[0] - first)
    integer_block(
        panel, panel, panels, first, rows, q, starts, x_scales, x_sums, w, w_scales, minimums, y, bias, scale,
        activation, residual,
    )  # fmt: skip


@kernel
def integer_block(
    w_panel, panel, panels, first, rows, q, starts, x_scales, x_sums, w, w_scales, minimums, y, bias, scale,
    activation, residual,
):  # fmt: skip
    """The same for integers."""
    product = np.empty(rows * BLOCK, np.float32)
    r = 0
    while rows >= 3 and r < rows:
        r = min(r, rows - 3)  # the last tile does some rows again: they come to the same
        _integer_tile_3(
            q, starts, x_scales, x_sums, first + r, w, w_scales, minimums, w_panel, panels, product, r * BLOCK
        )
        r += 3
    while r < rows:
        _integer_tile_1(
            q, starts, x_scales, x_sums, first + r, w, w_scales, minimums, w_panel, panels, product, r * BLOCK
        )
        r += 1
    _finish(product, rows, y, first, panel * PANEL, panels * PANEL, bias, scale, activation, residual)


@parallel_kernel
def matmul_float(x, norm, norm_weight, norm_bias, eps, w, width, bias, scale, activation, residual):
    """activation(scale · (norm(x) · Wᵀ + bias)) + residual, for W in float32 or bfloat16.

    x (M, K) float32; norm NONE, RMS or LAYER (norm.py) with its weight and bias (K,) and eps; w (N/16, K, 16) packed;
    bias (N,), residual (M, width) or empty; activation PLAIN, GELU, GELU_TANH, or SILU_MUL, which makes one number of
    two: of W's panels the even ones are gates, each followed by what it lets through. -> y (M, width) float32.
    """
    M, K = x.shape
    if norm:
        h = np.empty((M, K), np.float32)
        if M == 1:
            norm_row(x, norm, norm_weight, norm_bias, eps, h, np.int64(0))
        else:
            for m in prange(M):
                norm_row(x, norm, norm_weight, norm_bias, eps, h, np.int64(m))
    else:
        h = x
    y = np.empty((M, width), np.float32)
    chunks = (M + CHUNK - 1) // CHUNK
    panels = FINE if M == 1 else BLOCK // PANEL
    for item in prange(chunks * (w.shape[0] // panels)):
        _float_item(np.int64(item), chunks, panels, h, w, y, bias, scale, activation, residual)
    return y


@parallel_kernel
def matmul_integer(
    x,
    norm,
    norm_weight,
    norm_bias,
    eps,
    kind,
    largest,
    zero,
    w,
    w_scales,
    minimums,
    width,
    bias,
    scale,
    activation,
    residual,
):
    """The same for W in 8 or 4 bits and x rounded to 16 or 8: see quant.py for how they are packed.

    `kind` is an empty array of the activations' type, `largest` what they are rounded to, `zero` what the packed
    weights have been raised by.
    """
    M = x.shape[0]
    group, q, starts, x_scales, x_sums = room_for_rows(M, kind, w, w_scales)
    if M == 1:
        prepare_row(
            x, norm, norm_weight, norm_bias, eps, np.int64(0), q, starts, x_scales, x_sums, group, largest, zero
        )
    else:
        for m in prange(M):
            prepare_row(
                x, norm, norm_weight, norm_bias, eps, np.int64(m), q, starts, x_scales, x_sums, group, largest, zero
            )
    y = np.empty((M, width), np.float32)
    chunks = (M + CHUNK - 1) // CHUNK
    panels = FINE if M == 1 else BLOCK // PANEL
    for item in prange(chunks * (w.shape[0] // panels)):
        _integer_item(
            np.int64(item), chunks, panels, q, starts, x_scales, x_sums, w, w_scales, minimums, y, bias, scale,
            activation, residual,
        )  # fmt: skip
    return y


@kernel
def room_for_rows(M, kind, w, w_scales):
    """How many inputs share a scale of w; and, for M quantized rows, integers, starts, scales and sums to be filled."""
    groups = w_scales.shape[1]
    group = w.shape[1] // groups * inputs_per_load(w)
    q, starts = np.empty((M, groups * group), kind.dtype), np.empty((M, groups), np.int32)
    return group, q, starts, np.empty((M, groups), np.float32), np.empty((M, groups), np.float32)


@kernel
def prepare_row(x, norm, norm_weight, norm_bias, eps, m, q, starts, scales, sums, group, largest, zero):
    if norm:
        K = x.shape[1]
        h = np.empty((1, K), np.float32)
        norm_row(x[m : m + 1], norm, norm_weight, norm_bias, eps, h, 0)
        quantize_row(h, 0, q[m : m + 1], starts[m : m + 1], scales[m : m + 1], sums[m : m + 1], group, largest, zero)
    else:
        quantize_row(
            x[m : m + 1], 0, q[m : m + 1], starts[m : m + 1], scales[m : m + 1], sums[m : m + 1], group, largest, zero
        )
