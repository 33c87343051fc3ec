"""Mamba2's kernels: the short convolution, the selective scan, and the norm behind the gate.

Dao and Gu 2024, arXiv:2405.21060. Knows no model, and not who owns the memory: a sequence's window and state live in
rows of arrays that the caller keeps, `slots` tells which, and the kernels update them in place.

Letters: x, B, C, dt, A, D and the state S as in the paper; z is the gate. In one head, for one token,

    S = exp(dt·A) · S + B ⊗ (dt·x)        S (d_state, d_head)
    y = C · S + D·x                       y (d_head,)

Tokens of several sequences stand side by side. Every number is computed token after token in one fixed order, so that
it is the same, to the bit, in whatever company and however a sequence is cut into calls. (The paper's own algorithm
multiplies matrices inside chunks of tokens, and its sums depend on where the chunks begin; scripts/kernels/mamba2.py
compares the two.)
"""

from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from tinyserve.tensor import program
from tinyserve.tensor._jit import kernel
from tinyserve.tensor.native import stack_array
from tinyserve.tensor.program import constant, instruction
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
from tinyserve.tensor.thread_pool import next_items

Array = np.ndarray

CHANNELS = 64  # of the convolution, in a work item
CHUNK = 32  # tokens whose inputs and outputs stay in the nearest cache while a head's state passes over them
ROWS = 4  # of the state, in registers
APART = 4096  # bytes between what two threads write: nearer, one's reading would fetch ahead what the other writes


class Sequences(NamedTuple):
    """Whose the tokens are: those of sequence i are starts[i] .. starts[i + 1], and it is remembered in slots[i]."""

    starts: Array  # (sequences + 1,) int64
    slots: Array  # (sequences,) int64


@constant
class Convolution(NamedTuple):
    """A layer's short convolution."""

    weight: Array  # (d_conv, channels) float32, oldest input first
    bias: Array  # (channels,) float32


@constant
class Scan(NamedTuple):
    """A layer's constants of the scan; `groups` of neighbouring heads share their B and C."""

    A: Array  # (heads,) float32, -exp(A_log)
    D: Array  # (heads,) float32
    dt_bias: Array  # (heads,) float32
    dt_min: np.float32
    dt_max: np.float32
    groups: int


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
def _convolve(inputs, column, convolution, windows, sequences, i, c_first, c_last, y):
    """Channels c_first .. c_last of the tokens of sequence i."""
    weight, bias = convolution.weight, convolution.bias
    slot, first, last = sequences.slots[i], sequences.starts[i], sequences.starts[i + 1]
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


@kernel
def _move_window(inputs, column, windows, sequences, i, c_first, c_last):
    """The same channels of the window of sequence i go on to its last inputs."""
    slot, first, last = sequences.slots[i], sequences.starts[i], sequences.starts[i + 1]
    past, channels = windows.shape[1:]
    for k in range(past):
        source = last - past + k
        for c in range(c_first, c_last, LANES):
            left = channels - c
            if source >= first:
                v = _load(inputs, source * inputs.shape[1] + column + c, left)
            else:
                v = _load(windows, (slot * past + source - first + past) * channels + c, left)
            _store(windows, (slot * past + k) * channels + c, v, left)


@instruction
def _causal_conv1d(team, inputs, column, convolution, windows, sequences, y):
    tokens, channels = y.shape
    # One token's channels are a block for each thread: smaller ones are less work than to ask for them.
    share = (channels + team.threads * LANES - 1) // (team.threads * LANES) * LANES
    block = share if tokens == 1 else CHANNELS
    blocks = (channels + block - 1) // block
    first, last = next_items(team, blocks)
    while first < last:
        c_first, c_last = first * block, min(channels, last * block)
        for i in range(sequences.slots.size):
            _convolve(inputs, column, convolution, windows, sequences, i, c_first, c_last, y)
            _move_window(inputs, column, windows, sequences, i, c_first, c_last)
        first, last = next_items(team, blocks)


def causal_conv1d(inputs: Array, column: int, convolution: Convolution, windows: Array, sequences: Sequences) -> Array:
    """silu(bias + sum over k of weight[k] · the input d_conv - 1 - k tokens back), channel by channel.

    inputs (tokens, width) float32, its channels from `column` on, so that the whole product of `in_proj` (z | x, B, C |
    dt) may be given; windows (slots, d_conv - 1, channels): each sequence's last inputs, zero before its first.
    -> (tokens, channels)
    """
    y = program.empty((inputs.shape[0], convolution.weight.shape[1]))
    _causal_conv1d(inputs, column, convolution, windows, sequences, y)
    return y


# --- the scan -------------------------------------------------------------------------------------------------------


class Scratch(NamedTuple):
    """What each thread keeps of a chunk of tokens: (threads, rows, width) float32, the first rows the tokens'."""

    steps: Array  # dt·x
    totals: Array  # y


def _scratch(tokens: int, d_head: int) -> Scratch:
    width = (d_head + LANES - 1) // LANES * LANES
    rows = min(CHUNK, tokens) + (APART + 4 * width - 1) // (4 * width)
    shape = program.num_threads(), rows, width
    return Scratch(program.empty(shape), program.empty(shape))


class Chunk(NamedTuple):
    """A chunk of tokens that passes over a head's state."""

    tokens: int
    decays: Array  # (CHUNK,): exp(dt·A)
    steps: Array  # (rows, width), as are the totals: a thread's scratch
    totals: Array
    state: int  # where the head's state begins in the states, as a flat index
    B: int  # where the first token's B begins in xBC, and its C
    C: int


@kernel
def _scan_rows(xBC, states, chunk, n, p):
    """ROWS rows of a head's state from row n on, 16 lanes wide from column p on, over a chunk's tokens."""
    stride, d_head, width = xBC.shape[1], states.shape[3], chunk.steps.shape[1]
    s, left = chunk.state + n * d_head + p, d_head - p
    b, c = chunk.B + n, chunk.C + n
    s0, s1 = _load(states, s, left), _load(states, s + d_head, left)
    s2, s3 = _load(states, s + 2 * d_head, left), _load(states, s + 3 * d_head, left)
    for t in range(chunk.tokens):
        decay, at = broadcast(chunk.decays, t), t * width + p
        step, total = load(chunk.steps, at), load(chunk.totals, at)
        s0 = fma(s0, decay, step * broadcast(xBC, b))
        s1 = fma(s1, decay, step * broadcast(xBC, b + 1))
        s2 = fma(s2, decay, step * broadcast(xBC, b + 2))
        s3 = fma(s3, decay, step * broadcast(xBC, b + 3))
        total = fma(s0, broadcast(xBC, c), total)
        total = fma(s1, broadcast(xBC, c + 1), total)
        total = fma(s2, broadcast(xBC, c + 2), total)
        store(chunk.totals, at, fma(s3, broadcast(xBC, c + 3), total))
        b += stride
        c += stride
    _store(states, s, s0, left)
    _store(states, s + d_head, s1, left)
    _store(states, s + 2 * d_head, s2, left)
    _store(states, s + 3 * d_head, s3, left)


@kernel
def _scan_row(xBC, states, chunk, n, p):
    """The same for one row, where d_state is no multiple of ROWS."""
    stride, d_head, width = xBC.shape[1], states.shape[3], chunk.steps.shape[1]
    s, b, c = chunk.state + n * d_head + p, chunk.B + n, chunk.C + n
    row = _load(states, s, d_head - p)
    for t in range(chunk.tokens):
        at = t * width + p
        row = fma(row, broadcast(chunk.decays, t), load(chunk.steps, at) * broadcast(xBC, b + t * stride))
        total = fma(row, broadcast(xBC, c + t * stride), load(chunk.totals, at))
        store(chunk.totals, at, total)
    _store(states, s, row, d_head - p)


@kernel
def _scan_token(xBC, states, chunk, p):
    """All rows of a head's state, 32 lanes wide from column p on, over one token, whose outputs stay in registers."""
    d_state, d_head = states.shape[2:]
    left, right = d_head - p, d_head - p - LANES
    decay = broadcast(chunk.decays, 0)
    step0, step1 = _load(chunk.steps, p, left), _load(chunk.steps, p + LANES, right)
    total0, total1 = _load(chunk.totals, p, left), _load(chunk.totals, p + LANES, right)
    for n in range(d_state):
        s, b, c = chunk.state + n * d_head + p, broadcast(xBC, chunk.B + n), broadcast(xBC, chunk.C + n)
        s0 = fma(_load(states, s, left), decay, step0 * b)
        s1 = fma(_load(states, s + LANES, right), decay, step1 * b)
        total0, total1 = fma(s0, c, total0), fma(s1, c, total1)
        _store(states, s, s0, left)
        _store(states, s + LANES, s1, right)
    _store(chunk.totals, p, total0, left)
    _store(chunk.totals, p + LANES, total1, right)


@kernel
def _discretize(dt, scan, head, start, count, steps, decays):
    """The steps softplus(dt + dt_bias), within their limits, and the decays exp(dt·A) of a chunk's tokens."""
    for t in range(count):
        steps[t] = dt[start + t, dt.shape[1] - scan.A.size + head] + scan.dt_bias[head]
    for t in range(0, count, LANES):
        store(steps, t, _softplus(load(steps, t)))
    for t in range(count):  # comparisons that nan passes
        if steps[t] < scan.dt_min:
            steps[t] = scan.dt_min
        elif steps[t] > scan.dt_max:
            steps[t] = scan.dt_max
    for t in range(0, count, LANES):
        store(decays, t, exp(load(steps, t) * splat(scan.A[head])))


@kernel
def _scan_head(xBC, dt, scan, states, sequences, item, steps, totals, y):
    """One head of one sequence, over its tokens, a chunk of them at a time."""
    head, i = item // sequences.slots.size, item % sequences.slots.size
    slot, first, last = sequences.slots[i], sequences.starts[i], sequences.starts[i + 1]
    heads, d_state, d_head = states.shape[1:]
    stride, inner, width = xBC.shape[1], heads * d_head, steps.shape[1]
    group = head // (heads // scan.groups)
    dts, decays = stack_array(CHUNK, np.float32), stack_array(CHUNK, np.float32)
    for start in range(first, last, CHUNK):
        count = min(CHUNK, last - start)
        _discretize(dt, scan, head, start, count, dts, decays)
        for t in range(count):
            for p in range(0, d_head, LANES):
                x = _load(xBC, (start + t) * stride + head * d_head + p, d_head - p)
                store(steps, t * width + p, broadcast(dts, t) * x)
                store(totals, t * width + p, splat(scan.D[head]) * x)
        b = start * stride + inner + group * d_state
        state = (slot * heads + head) * d_state * d_head
        chunk = Chunk(count, decays, steps, totals, state, b, b + scan.groups * d_state)
        if count == 1:
            for p in range(0, d_head, 2 * LANES):
                _scan_token(xBC, states, chunk, p)
        else:
            whole = d_state // ROWS * ROWS
            for n in range(0, whole, ROWS):
                for p in range(0, d_head, LANES):
                    _scan_rows(xBC, states, chunk, n, p)
            for n in range(whole, d_state):
                for p in range(0, d_head, LANES):
                    _scan_row(xBC, states, chunk, n, p)
        for t in range(count):
            for p in range(0, d_head, LANES):
                at = (start + t) * inner + head * d_head + p
                _store(y, at, load(totals, t * width + p), d_head - p)


@instruction
def _selective_scan(team, xBC, dt, scan, states, sequences, scratch, y):
    steps, totals = scratch.steps[team.thread], scratch.totals[team.thread]
    # A thread's share is a run of items: some heads of every sequence, long and short alike.
    items = states.shape[1] * sequences.slots.size
    first, last = next_items(team, items)
    while first < last:
        for item in range(first, last):
            _scan_head(xBC, dt, scan, states, sequences, item, steps, totals, y)
        first, last = next_items(team, items)


def selective_scan(xBC: Array, dt: Array, scan: Scan, states: Array, sequences: Sequences) -> Array:
    """y = C·S + D·x with S = exp(dt·A)·S + B ⊗ (dt·x), dt = softplus(dt + dt_bias) from dt_min to dt_max.

    xBC (tokens, heads·d_head + 2·groups·d_state) float32: x, then B and C of each group, which heads // groups
    neighbouring heads share; dt (tokens, heads), or any wider matrix that ends with it, such as the product of
    `in_proj`; states (slots, heads, d_state, d_head) float32, transposed like the keys of attention, so that a vector
    is 16 numbers of y and no sum runs over lanes. -> y (tokens, heads·d_head)
    """
    tokens, heads, d_head = xBC.shape[0], states.shape[1], states.shape[3]
    y = program.empty((tokens, heads * d_head))
    _selective_scan(xBC, dt, scan, states, sequences, _scratch(tokens, d_head), y)
    return y


# --- the norm -------------------------------------------------------------------------------------------------------


@kernel
def _gated_part(y, gate, weight, eps, groups, out, item):
    """One of the `groups` parts of one row."""
    m, group = item // groups, item % groups
    inner, stride = y.shape[1], gate.shape[1]
    size = inner // groups
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


@instruction
def _gated_rms_norm(team, y, gate, weight, eps, groups, out):
    items = y.shape[0] * groups
    first, last = next_items(team, items)
    while first < last:
        for item in range(first, last):
            _gated_part(y, gate, weight, eps, groups, out, item)
        first, last = next_items(team, items)


def gated_rms_norm(y: Array, gate: Array, weight: Array, eps: np.float32, groups: int) -> Array:
    """v = y · silu(gate); weight · v / sqrt(mean(v²) + eps), the mean over each of `groups` equal parts of a row.

    y (tokens, inner) float32; gate (tokens, inner), or any wider matrix that begins with it, such as the product of
    `in_proj`; weight (inner,). -> (tokens, inner)
    """
    out = program.empty(y.shape)
    _gated_rms_norm(y, gate, weight, eps, groups, out)
    return out
