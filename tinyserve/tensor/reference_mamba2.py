"""mamba2.py and moe.py once more in plain NumPy, written to be read: their specification, as reference.py is of others.

Same names, same arguments, same results to rounding. Nothing here is fast, and nothing but tests calls it.
"""

import numpy as np

from tinyserve.tensor.mamba2 import Convolution, Scan, Sequences

Array = np.ndarray


def silu(v: Array) -> Array:
    with np.errstate(over="ignore"):
        return v / (1 + np.exp(-v))


def softplus(v: Array) -> Array:
    """log(1 + e^v), which overflows nowhere."""
    return np.log1p(np.exp(-np.abs(v))) + np.maximum(v, 0)


def causal_conv1d(inputs: Array, column: int, convolution: Convolution, windows: Array, sequences: Sequences) -> Array:
    weight, bias = convolution
    d_conv, channels = weight.shape
    y = np.empty((len(inputs), channels), np.float32)
    for slot, first, last in zip(sequences.slots, sequences.starts[:-1], sequences.starts[1:], strict=True):
        new = inputs[first:last, column : column + channels]
        seen = np.concatenate([windows[slot], new])  # (d_conv - 1 + tokens, channels)
        for t in range(last - first):
            y[first + t] = silu(bias + np.sum(weight * seen[t : t + d_conv], axis=0))
        windows[slot] = seen[len(new) :]
    return y


def selective_scan(xBC: Array, dt: Array, scan: Scan, states: Array, sequences: Sequences) -> Array:
    A, D, dt_bias, dt_min, dt_max, groups = scan
    _, heads, d_state, d_head = states.shape
    x, B, C = np.split(xBC.astype(np.float64), [heads * d_head, heads * d_head + groups * d_state], axis=1)
    x = x.reshape(-1, heads, d_head)
    B = np.repeat(B.reshape(-1, groups, d_state), heads // groups, axis=1)  # (tokens, heads, d_state)
    C = np.repeat(C.reshape(-1, groups, d_state), heads // groups, axis=1)
    dt = np.clip(softplus(dt[:, -heads:].astype(np.float64) + dt_bias), dt_min, dt_max)  # (tokens, heads)
    y = np.empty(x.shape, np.float32)
    for slot, first, last in zip(sequences.slots, sequences.starts[:-1], sequences.starts[1:], strict=True):
        S = states[slot].astype(np.float64)  # (heads, d_state, d_head)
        for t in range(first, last):
            new = B[t][:, :, None] * (dt[t][:, None] * x[t])[:, None, :]
            S = np.exp(dt[t] * A)[:, None, None] * S + new
            y[t] = np.einsum("hn,hnp->hp", C[t], S) + D[:, None] * x[t]
        states[slot] = S
    return y.reshape(len(xBC), -1)


def gated_rms_norm(y: Array, gate: Array, weight: Array, eps: float, groups: int) -> Array:
    v = (y * silu(gate[:, : y.shape[1]])).reshape(len(y), groups, -1)
    v = v / np.sqrt(np.mean(np.square(v), axis=2, keepdims=True) + np.float32(eps))
    return weight * v.reshape(y.shape)


def route(logits: Array, top_k: int) -> tuple[Array, Array]:
    descending = np.where(np.isnan(logits), -np.inf, -logits)  # nan comes first
    ids = np.argsort(descending, axis=1, kind="stable")[:, :top_k]  # (tokens, top_k)
    largest = np.take_along_axis(logits, ids, axis=1)
    weights = np.exp(largest - largest[:, :1])
    return ids, weights / weights.sum(axis=1, keepdims=True)


def group_by_expert(ids: Array, experts: int) -> tuple[Array, Array]:
    order = np.argsort(ids.ravel(), kind="stable")  # which token's rank a row is
    return np.argsort(order).reshape(ids.shape), np.searchsorted(ids.ravel()[order], np.arange(experts + 1))


def gather_rows(x: Array, row_of: Array) -> Array:
    rows = np.empty((row_of.size, x.shape[1]), x.dtype)
    rows[row_of] = x[:, None]
    return rows


def combine(rows: Array, row_of: Array, weights: Array, onto: Array) -> Array:
    return onto + np.einsum("tk,tkh->th", weights, rows[row_of])
