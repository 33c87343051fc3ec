"""Mamba2's kernels: the short convolution, the selective scan, and the norm behind the gate.

Dao and Gu 2024, arXiv:2405.21060. Knows no model, and not who owns the memory: a sequence's window and state live in
rows of arrays that the caller keeps, `slots` tells which, and the kernels update them in place.

Letters: x, B, C, dt, A, D and the state S as in the paper; z is the gate. In one head, for one token,

    S = exp(dt·A) · S + B ⊗ (dt·x)        S (d_state, d_head)
    y = C · S + D·x                       y (d_head,)

Tokens of several sequences stand side by side; those of sequence i are starts[i] .. starts[i + 1]. Every number is
computed token after token in one fixed order, so that it is the same, to the bit, in whatever company and however a
sequence is cut into calls. (The paper's own algorithm multiplies matrices inside chunks of tokens, and its sums depend
on where the chunks begin; scripts/kernels/mamba2.py compares the two.)
"""

import numpy as np
from numba import prange, types
from numba.extending import intrinsic

from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.simd import (
    F32,
    LANES,
    absolute,
    emit_address,
    emit_splat,
    exp,
    f32x16,
    fma,
    load,
    load_first,
    maximum,
    splat,
    store,
    store_first,
    sum_lanes,
)

CHANNELS = 64  # of the convolution, in a work item
CHUNK = 32  # tokens whose inputs and outputs stay in the nearest cache while a head's state passes over them
ROWS = 4  # of the state, in registers
SMALL_STATE = 1 << 15  # numbers of a sequence's state below which a second thread costs more than it helps


@intrinsic
def broadcast(typing_context, array, index):
    """The number at a flat index of a float32 array, in all 16 lanes."""
    if array.dtype != types.float32:
        return None

    def codegen(context, builder, sig, args):
        return emit_splat(builder, builder.load(emit_address(context, builder, sig.args[0], args[0], args[1], F32)))

    return f32x16(array, types.intp), codegen


@kernel
def _load(array, at, count):
    """16 neighbours, of which only the first `count` exist when it is less: the others are zero."""
    return load(array, at) if count >= LANES else load_first(array, at, count)


@kernel
def _store(array, at, vector, count):
    if count >= LANES:
        store(array, at, vector)
    else:
        store_first(array, at, vector, count)


@kernel
def _silu(v):
    return v / (splat(np.float32(1.0)) + exp(splat(np.float32(0.0)) - v))


@kernel
def _softplus(v):
    """log(1 + e^v) = max(v, 0) + log(1 + u), u = e^-|v| <= 1, and log(1 + u) = 2·artanh(u / (2 + u)) by its series."""
    u = exp(splat(np.float32(0.0)) - absolute(v))
    s = u / (splat(np.float32(2.0)) + u)
    q = s * s
    series = splat(np.float32(2.0 / 15.0))
    series = fma(series, q, splat(np.float32(2.0 / 13.0)))
    series = fma(series, q, splat(np.float32(2.0 / 11.0)))
    series = fma(series, q, splat(np.float32(2.0 / 9.0)))
    series = fma(series, q, splat(np.float32(2.0 / 7.0)))
    series = fma(series, q, splat(np.float32(2.0 / 5.0)))
    series = fma(series, q, splat(np.float32(2.0 / 3.0)))
    series = fma(series, q, splat(np.float32(2.0)))
    return fma(series, s, maximum(v, splat(np.float32(0.0))))


# --- the convolution ------------------------------------------------------------------------------------------------


@kernel
def _convolve(inputs, column, weight, bias, windows, slot, first, last, c_first, c_last, y):
    """Channels c_first .. c_last of the tokens first .. last of one sequence; then its window."""
    d_conv, channels = weight.shape
    width, past = inputs.shape[1], d_conv - 1
    for t in range(first, last):
        for c in range(c_first, c_last, LANES):
            left = channels - c
            total = _load(bias, c, left)
            for k in range(d_conv):
                source = t - past + k
                if source >= first:
                    v = _load(inputs, source * width + column + c, left)
                else:
                    v = _load(windows, (slot * past + source - first + past) * channels + c, left)
                total = fma(v, _load(weight, k * channels + c, left), total)
            _store(y, t * channels + c, _silu(total), left)
    for k in range(past):
        source = last - past + k
        for c in range(c_first, c_last):
            if source >= first:
                windows[slot, k, c] = inputs[source, column + c]
            else:
                windows[slot, k, c] = windows[slot, source - first + past, c]


@parallel_kernel
def causal_conv1d(inputs, column, weight, bias, windows, starts, slots):
    """silu(bias + sum over k of weight[k] · the input d_conv - 1 - k tokens back), channel by channel.

    inputs (tokens, width) float32, its channels from `column` on, so that the whole product of `in_proj` (z | x, B, C |
    dt) may be given; weight (d_conv, channels), oldest input first; bias (channels,); windows (slots, d_conv - 1,
    channels): each sequence's last inputs, zero before its first; starts (sequences + 1,), slots (sequences,) int64.
    -> (tokens, channels)
    """
    channels = weight.shape[1]
    y = np.empty((inputs.shape[0], channels), np.float32)
    if inputs.shape[0] == 1:
        for i in range(slots.size):
            _convolve(inputs, column, weight, bias, windows, slots[i], starts[i], starts[i + 1], 0, channels, y)
    else:
        for item in prange((channels + CHANNELS - 1) // CHANNELS):
            c = item * CHANNELS
            for i in range(slots.size):
                _convolve(
                    inputs, column, weight, bias, windows, slots[i], starts[i], starts[i + 1],
                    c, min(channels, c + CHANNELS), y,
                )  # fmt: skip
    return y


# --- the scan -------------------------------------------------------------------------------------------------------


@kernel
def _scan_rows(states, s, d_head, p, xBC, b, c, stride, scratch, decays, steps, totals, width, count):
    """ROWS rows of a head's state, 16 lanes wide, over `count` tokens.

    Flat indices: s of the first row in the states, b and c of the first token's B and C in xBC, whose rows are `stride`
    long; in the scratch, of the tokens' exp(dt·A), and of their dt·x and y, whose rows are `width` long.
    """
    left = d_head - p
    s0, s1 = _load(states, s, left), _load(states, s + d_head, left)
    s2, s3 = _load(states, s + 2 * d_head, left), _load(states, s + 3 * d_head, left)
    for t in range(count):
        decay, at = broadcast(scratch, decays + t), t * width + p
        step, total = load(scratch, steps + at), load(scratch, totals + at)
        s0 = fma(s0, decay, step * broadcast(xBC, b))
        s1 = fma(s1, decay, step * broadcast(xBC, b + 1))
        s2 = fma(s2, decay, step * broadcast(xBC, b + 2))
        s3 = fma(s3, decay, step * broadcast(xBC, b + 3))
        total = fma(s0, broadcast(xBC, c), total)
        total = fma(s1, broadcast(xBC, c + 1), total)
        total = fma(s2, broadcast(xBC, c + 2), total)
        store(scratch, totals + at, fma(s3, broadcast(xBC, c + 3), total))
        b += stride
        c += stride
    _store(states, s, s0, left)
    _store(states, s + d_head, s1, left)
    _store(states, s + 2 * d_head, s2, left)
    _store(states, s + 3 * d_head, s3, left)


@kernel
def _scan_row(states, s, d_head, p, xBC, b, c, stride, scratch, decays, steps, totals, width, count):
    """The same for one row, where d_state is no multiple of ROWS."""
    row = _load(states, s, d_head - p)
    for t in range(count):
        at = t * width + p
        row = fma(row, broadcast(scratch, decays + t), load(scratch, steps + at) * broadcast(xBC, b + t * stride))
        total = fma(row, broadcast(xBC, c + t * stride), load(scratch, totals + at))
        store(scratch, totals + at, total)
    _store(states, s, row, d_head - p)


@kernel
def _scan_head(xBC, dt, A, D, dt_bias, dt_min, dt_max, groups, states, slot, head, first, last, y):
    """One head of one sequence, over its tokens first .. last, a chunk of them at a time."""
    heads, d_state, d_head = states.shape[1:]
    stride, inner = xBC.shape[1], heads * d_head
    group = head // (heads // groups)
    width = (d_head + LANES - 1) // LANES * LANES
    # In the scratch: each token's dt, its exp(dt·A), its dt·x and its y.
    decays, steps = CHUNK, 2 * CHUNK
    totals = steps + min(CHUNK, last - first) * width
    scratch = np.empty(totals + min(CHUNK, last - first) * width, np.float32)
    for start in range(first, last, CHUNK):
        count = min(CHUNK, last - start)
        for t in range(count):
            scratch[t] = dt[start + t, dt.shape[1] - heads + head] + dt_bias[head]
        for t in range(0, count, LANES):
            store(scratch, t, _softplus(load(scratch, t)))
        for t in range(count):  # comparisons that nan passes
            if scratch[t] < dt_min:
                scratch[t] = dt_min
            elif scratch[t] > dt_max:
                scratch[t] = dt_max
        for t in range(0, count, LANES):
            store(scratch, decays + t, exp(load(scratch, t) * splat(A[head])))
        for t in range(count):
            for p in range(0, d_head, LANES):
                x = _load(xBC, (start + t) * stride + head * d_head + p, d_head - p)
                store(scratch, steps + t * width + p, broadcast(scratch, t) * x)
                store(scratch, totals + t * width + p, splat(D[head]) * x)
        b = start * stride + inner + group * d_state
        c = b + groups * d_state
        whole = d_state // ROWS * ROWS
        s = (slot * heads + head) * d_state * d_head
        for n in range(0, whole, ROWS):
            for p in range(0, d_head, LANES):
                _scan_rows(
                    states, s + n * d_head + p, d_head, p, xBC, b + n, c + n, stride,
                    scratch, decays, steps, totals, width, count,
                )  # fmt: skip
        for n in range(whole, d_state):
            for p in range(0, d_head, LANES):
                _scan_row(
                    states, s + n * d_head + p, d_head, p, xBC, b + n, c + n, stride,
                    scratch, decays, steps, totals, width, count,
                )  # fmt: skip
        for t in range(count):
            for p in range(0, d_head, LANES):
                at = (start + t) * inner + head * d_head + p
                _store(y, at, load(scratch, totals + t * width + p), d_head - p)


@parallel_kernel
def selective_scan(xBC, dt, A, D, dt_bias, time_step_limit, groups, states, starts, slots):
    """y = C·S + D·x with S = exp(dt·A)·S + B ⊗ (dt·x), dt = softplus(dt + dt_bias) within time_step_limit.

    xBC (tokens, heads·d_head + 2·groups·d_state) float32: x, then B and C of each group, which heads // groups
    neighbouring heads share; dt (tokens, heads), or any wider matrix that ends with it, such as the product of
    `in_proj`; A = -exp(A_log), D and dt_bias (heads,); time_step_limit (lowest, highest); states (slots, heads,
    d_state, d_head) float32, transposed like the keys of attention, so that a vector is 16 numbers of y and no sum runs
    over lanes; starts (sequences + 1,), slots (sequences,) int64. -> y (tokens, heads·d_head)
    """
    heads, sequences = states.shape[1], slots.size
    dt_min, dt_max = np.float32(time_step_limit[0]), np.float32(time_step_limit[1])
    y = np.empty((xBC.shape[0], heads * states.shape[3]), np.float32)
    if xBC.shape[0] == 1 and heads * states.shape[2] * states.shape[3] <= SMALL_STATE:
        for item in range(sequences * heads):
            i, head = item % sequences, item // sequences
            _scan_head(
                xBC, dt, A, D, dt_bias, dt_min, dt_max, groups, states, slots[i], head, starts[i], starts[i + 1], y
            )
    else:
        # A thread's share is a run of items: some heads of every sequence, long and short alike.
        for item in prange(sequences * heads):
            i, head = item % sequences, item // sequences
            _scan_head(
                xBC, dt, A, D, dt_bias, dt_min, dt_max, groups, states, slots[i], head, starts[i], starts[i + 1], y
            )
    return y


# --- the norm -------------------------------------------------------------------------------------------------------


@kernel
def _gated_row(y, gate, weight, eps, groups, out, m):
    inner, stride = y.shape[1], gate.shape[1]
    size = inner // groups
    for group in range(groups):
        squares = splat(np.float32(0.0))
        for i in range(0, size, LANES):
            h = group * size + i
            v = _load(y, m * inner + h, size - i) * _silu(_load(gate, m * stride + h, size - i))
            _store(out, m * inner + h, v, size - i)
            squares = fma(v, v, squares)
        inverse = splat(np.float32(1.0) / np.sqrt(sum_lanes(squares) / np.float32(size) + eps))
        for i in range(0, size, LANES):
            h = group * size + i
            v = _load(out, m * inner + h, size - i) * inverse
            _store(out, m * inner + h, v * _load(weight, h, size - i), size - i)


@parallel_kernel
def gated_rms_norm(y, gate, weight, eps, groups):
    """v = y · silu(gate); weight · v / sqrt(mean(v²) + eps), the mean over each of `groups` equal parts of a row.

    y (tokens, inner) float32; gate (tokens, inner), or any wider matrix that begins with it, such as the product of
    `in_proj`; weight (inner,). -> (tokens, inner)
    """
    out = np.empty_like(y)
    if y.shape[0] == 1:
        _gated_row(y, gate, weight, eps, groups, out, 0)
    else:
        for m in prange(y.shape[0]):
            _gated_row(y, gate, weight, eps, groups, out, np.int64(m))
    return out
