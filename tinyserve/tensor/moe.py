"""A mixture of experts' routing: which experts a token goes to, in what order the rows are computed, and their sum.

Shazeer et al. 2017, arXiv:1701.06538. Knows no expert: between `gather_rows` and `combine`, each expert's rows lie
side by side, as grouped_matmul.py wants them.

A token takes k places, token·k + rank, rank 0 for its likeliest expert; an `order` lists places.
"""

import numpy as np
from numba import prange

from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.simd import LANES, fma, load, load_first, splat, store, store_first


@kernel
def _route_token(logits, ids, weights, m):
    experts, k = logits.shape[1], ids.shape[1]
    chosen = np.zeros(experts, np.bool_)
    for rank in range(k):
        best = -1
        for e in range(experts):
            # A nan is larger than any number, as in torch: it must come out in the weights, not vanish.
            if not chosen[e] and (
                best < 0 or logits[m, e] > logits[m, best] or (np.isnan(logits[m, e]) and not np.isnan(logits[m, best]))
            ):
                best = e
        chosen[best] = True
        ids[m, rank] = best
    total = np.float32(0.0)
    for rank in range(k):
        weights[m, rank] = np.exp(logits[m, ids[m, rank]] - logits[m, ids[m, 0]])
        total += weights[m, rank]
    for rank in range(k):
        weights[m, rank] /= total


@parallel_kernel
def route(logits, top_k):
    """logits (tokens, experts) float32 -> ids (tokens, top_k) int64 of the largest, and the softmax of those alone.

    Descending; of equal logits the lower id comes first. Weights (tokens, top_k) float32 sum to one; top_k <= experts.
    """
    ids = np.empty((logits.shape[0], top_k), np.int64)
    weights = np.empty((logits.shape[0], top_k), np.float32)
    if logits.shape[0] == 1:
        _route_token(logits, ids, weights, 0)
    else:
        for m in prange(logits.shape[0]):
            _route_token(logits, ids, weights, np.int64(m))
    return ids, weights


@kernel
def group_by_expert(ids, experts):
    """ids (tokens, k) -> order (tokens·k,) int64 of places, expert by expert and in each by token, and offsets.

    Rows offsets[e] .. offsets[e + 1] belong to expert e; offsets (experts + 1,) int64.
    """
    places = ids.ravel()
    offsets = np.zeros(experts + 1, np.int64)
    for expert in places:
        offsets[expert + 1] += 1
    for e in range(experts):
        offsets[e + 1] += offsets[e]
    order, following = np.empty(places.size, np.int64), offsets.copy()
    for place in range(places.size):
        order[following[places[place]]] = place
        following[places[place]] += 1
    return order, offsets


@kernel
def _copy_row(x, source, rows, target):
    H = x.shape[1]
    for h in range(0, H, LANES):
        if h + LANES <= H:
            store(rows, target * H + h, load(x, source * H + h))
        else:
            store_first(rows, target * H + h, load_first(x, source * H + h, H - h), H - h)


@parallel_kernel
def gather_rows(x, order):
    """x (tokens, hidden) float32, order (tokens·k,) -> the row of each place's token, (tokens·k, hidden)."""
    rows = np.empty((order.size, x.shape[1]), np.float32)
    k = order.size // max(1, x.shape[0])
    if x.shape[0] == 1:
        for i in range(order.size):
            _copy_row(x, 0, rows, i)
    else:
        for i in prange(order.size):
            _copy_row(x, order[i] // k, rows, i)
    return rows


@kernel
def _combine_token(y_rows, row_of, weights, y, m):
    H, k = y_rows.shape[1], weights.shape[1]
    for h in range(0, H, LANES):
        total = splat(np.float32(0.0))
        for rank in range(k):
            at = row_of[m * k + rank] * H + h
            v = load(y_rows, at) if h + LANES <= H else load_first(y_rows, at, H - h)
            total = fma(v, splat(weights[m, rank]), total)
        if h + LANES <= H:
            store(y, m * H + h, total)
        else:
            store_first(y, m * H + h, total, H - h)


@parallel_kernel
def combine(y_rows, order, weights):
    """y_rows (tokens·k, hidden) in `order`, weights (tokens, k) -> each token's weighted sum, (tokens, hidden).

    A token's rows are added by rank, whichever experts its neighbours went to.
    """
    y = np.empty((weights.shape[0], y_rows.shape[1]), np.float32)
    row_of = np.empty(order.size, np.int64)
    for i in range(order.size):
        row_of[order[i]] = i
    if weights.shape[0] == 1:
        _combine_token(y_rows, row_of, weights, y, 0)
    else:
        for m in prange(weights.shape[0]):
            _combine_token(y_rows, row_of, weights, y, np.int64(m))
    return y
