"""A mixture of experts' routing: which experts a token goes to, in what order the rows are computed, and their sum.

Shazeer et al. 2017, arXiv:1701.06538. Knows no expert: between `gather_rows` and `combine`, each expert's rows lie
side by side, as grouped_matmul.py wants them.

A token has a row for each of its k experts: row_of[token, rank], rank 0 for the likeliest.
"""

import numpy as np

from tinyserve.tensor import program
from tinyserve.tensor._jit import kernel
from tinyserve.tensor.program import instruction
from tinyserve.tensor.simd import LANES, fma, load, load_first, splat, store, store_first
from tinyserve.tensor.thread_pool import next_items

Array = np.ndarray

COLUMNS = 256  # of a token's sum, in a work item


@kernel
def _is_before(logits, m, a, b):
    """Whether expert a is chosen before expert b: its logit is larger, or the same and its id lower."""
    x, y = logits[m, a], logits[m, b]
    # A nan is larger than any number, as in torch: it must come out in the weights, not vanish.
    if np.isnan(x) or np.isnan(y):
        return a < b if np.isnan(x) and np.isnan(y) else np.isnan(x)
    return a < b if x == y else x > y


@kernel
def _route_token(logits, ids, weights, m):
    experts, k = logits.shape[1], ids.shape[1]
    last = -1
    for rank in range(k):
        best = -1
        for e in range(experts):
            if (last < 0 or _is_before(logits, m, last, e)) and (best < 0 or _is_before(logits, m, e, best)):
                best = e
        ids[m, rank] = last = best
    total = np.float32(0.0)
    for rank in range(k):
        weights[m, rank] = np.exp(logits[m, ids[m, rank]] - logits[m, ids[m, 0]])
        total += weights[m, rank]
    for rank in range(k):
        weights[m, rank] /= total


@instruction
def _route(team, logits, ids, weights):
    first, last = next_items(team, logits.shape[0])
    while first < last:
        for m in range(first, last):
            _route_token(logits, ids, weights, m)
        first, last = next_items(team, logits.shape[0])


def route(logits: Array, top_k: int) -> tuple[Array, Array]:
    """logits (tokens, experts) float32 -> ids (tokens, top_k) int64 of the largest, and the softmax of those alone.

    Descending; of equal logits the lower id comes first. Weights (tokens, top_k) float32 sum to one; top_k <= experts.
    """
    shape = logits.shape[0], top_k
    ids, weights = program.empty(shape, np.int64), program.empty(shape)
    _route(logits, ids, weights)
    return ids, weights


@instruction
def _group_by_expert(team, ids, row_of, offsets):
    if team.thread != 0:  # too little to share
        return
    offsets[:] = 0
    for m in range(ids.shape[0]):
        for rank in range(ids.shape[1]):
            offsets[ids[m, rank] + 1] += 1
    first = 0
    for expert in range(offsets.size - 1):
        count, offsets[expert + 1] = offsets[expert + 1], first
        first += count
    # offsets[expert + 1] is the expert's next row: behind its last one when all have theirs.
    for m in range(ids.shape[0]):
        for rank in range(ids.shape[1]):
            expert = ids[m, rank]
            row_of[m, rank] = offsets[expert + 1]
            offsets[expert + 1] += 1


def group_by_expert(ids: Array, experts: int) -> tuple[Array, Array]:
    """ids (tokens, k) int64 -> row_of (tokens, k) int64, expert by expert and in each by token, and offsets.

    Rows offsets[e] .. offsets[e + 1] belong to expert e; offsets (experts + 1,) int64.
    """
    row_of, offsets = program.empty(ids.shape, np.int64), program.empty(experts + 1, np.int64)
    _group_by_expert(ids, row_of, offsets)
    return row_of, offsets


@kernel
def _copy_row(x, source, rows, target):
    H = x.shape[1]
    for h in range(0, H, LANES):
        if h + LANES <= H:
            store(rows, target * H + h, load(x, source * H + h))
        else:
            store_first(rows, target * H + h, load_first(x, source * H + h, H - h), H - h)


@instruction
def _gather_rows(team, x, row_of, rows):
    k = row_of.shape[1]
    first, last = next_items(team, row_of.size)
    while first < last:
        for item in range(first, last):
            _copy_row(x, item // k, rows, row_of[item // k, item % k])
        first, last = next_items(team, row_of.size)


def gather_rows(x: Array, row_of: Array) -> Array:
    """x (tokens, hidden) float32, row_of (tokens, k) int64 -> each token k times, where its experts' rows are.

    (tokens·k, hidden)
    """
    rows = program.empty((row_of.size, x.shape[1]))
    _gather_rows(x, row_of, rows)
    return rows


@kernel
def _combine_part(rows, row_of, weights, onto, y, item):
    """COLUMNS columns of one token."""
    H, k = y.shape[1], weights.shape[1]
    parts = (H + COLUMNS - 1) // COLUMNS
    m, first = item // parts, item % parts * COLUMNS
    for h in range(first, min(H, first + COLUMNS), LANES):
        total = splat(np.float32(0.0))
        for rank in range(k):
            at = row_of[m, rank] * H + h
            v = load(rows, at) if h + LANES <= H else load_first(rows, at, H - h)
            total = fma(v, splat(weights[m, rank]), total)
        at = m * H + h
        if h + LANES <= H:
            store(y, at, load(onto, at) + total)
        else:
            store_first(y, at, load_first(onto, at, H - h) + total, H - h)


@instruction
def _combine(team, rows, row_of, weights, onto, y):
    items = y.shape[0] * ((y.shape[1] + COLUMNS - 1) // COLUMNS)
    first, last = next_items(team, items)
    while first < last:
        for item in range(first, last):
            _combine_part(rows, row_of, weights, onto, y, item)
        first, last = next_items(team, items)


def combine(rows: Array, row_of: Array, weights: Array, onto: Array) -> Array:
    """rows (tokens·k, hidden), row_of and weights (tokens, k), onto (tokens, hidden) -> onto + the weighted sums.

    A token's rows are added by rank, whichever experts its neighbours went to. -> (tokens, hidden)
    """
    y = program.empty(onto.shape)
    _combine(rows, row_of, weights, onto, y)
    return y
