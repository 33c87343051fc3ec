"""mamba2.py and moe.py once more in plain NumPy, written to be read: their specification, as reference.py is of others.

Same names, same arguments, same results to rounding. Nothing here is fast, and nothing but tests calls it.
"""

import numpy as np

Array = np.ndarray


def silu(v: Array) -> Array:
    with np.errstate(over="ignore"):
        return v / (1 + np.exp(-v))


def softplus(v: Array) -> Array:
    """log(1 + e^v), which overflows nowhere."""
    return np.log1p(np.exp(-np.abs(v))) + np.maximum(v, 0)


def causal_conv1d(
    inputs: Array, column: int, weight: Array, bias: Array, windows: Array, starts: Array, slots: Array
) -> Array:
    d_conv, channels = weight.shape
    y = np.empty((len(inputs), channels), np.float32)
    for slot, first, last in zip(slots, starts[:-1], starts[1:], strict=True):
        new = inputs[first:last, column : column + channels]
        seen = np.concatenate([windows[slot], new])  # (d_conv - 1 + tokens, channels)
        for t in range(last - first):
            y[first + t] = silu(bias + np.sum(weight * seen[t : t + d_conv], axis=0))
        windows[slot] = seen[len(new) :]
    return y


def selective_scan(
    xBC: Array, dt: Array, A: Array, D: Array, dt_bias: Array, time_step_limit: tuple[float, float], groups: int,
    states: Array, starts: Array, slots: Array,
) -> Array:  # fmt: skip
    _, heads, d_state, d_head = states.shape
    x, B, C = np.split(xBC.astype(np.float64), [heads * d_head, heads * d_head + groups * d_state], axis=1)
    x = x.reshape(-1, heads, d_head)
    B = np.repeat(B.reshape(-1, groups, d_state), heads // groups, axis=1)  # (tokens, heads, d_state)
    C = np.repeat(C.reshape(-1, groups, d_state), heads // groups, axis=1)
    dt = np.clip(softplus(dt[:, -heads:].astype(np.float64) + dt_bias), *time_step_limit)  # (tokens, heads)
    y = np.empty(x.shape, np.float32)
    for slot, first, last in zip(slots, starts[:-1], starts[1:], strict=True):
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
    order = np.argsort(ids.ravel(), kind="stable")
    return order, np.searchsorted(ids.ravel()[order], np.arange(experts + 1))


def gather_rows(x: Array, order: Array) -> Array:
    k = len(order) // len(x)
    return x[order // k]


def combine(y_rows: Array, order: Array, weights: Array) -> Array:
    places = np.empty_like(y_rows)
    places[order] = y_rows
    return np.einsum("tk,tkh->th", weights, places.reshape(*weights.shape, -1))
