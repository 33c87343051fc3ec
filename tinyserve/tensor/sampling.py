"""From logits to a token: greedy, or drawn from what temperature, top-k, top-p and min-p leave.

Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al. 2024, arXiv:2407.01082 (min-p). A row's answer depends on
its own logits and its own random number. Nothing is sorted: what top-k and top-p keep is everything above one logit,
and the first few that equal it, and that logit is found by its bits.

Weights, e^((logit - largest) / temperature), are float32 and added up in chunks, the chunks in float64. Probabilities
are right to about a part in a million, which is what a logit's own rounding does to them.
"""

import numpy as np
from numba import prange

from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.simd import (
    LANES,
    exp,
    first_lanes,
    load,
    load_first,
    max_lane,
    maximum,
    splat,
    store_first,
    sum_lanes,
    zero_below,
)

Array = np.ndarray

CHUNK = 256  # logits that have a largest one and a sum of weights of their own
LEVELS = ((21, 11), (10, 11), (0, 10))  # how the 32 bits of a float are looked at: from which bit on, and how many
BUCKETS = 1 << 11
SLACK = 1e-3  # what rounding can do to the logarithm of a weight, generously


def sample(logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, uniform: Array) -> Array:
    """logits (rows, vocab) float32 -> a token id for each row (rows,) int64; -1 where the largest is no finite number.

    temperature, top_p, min_p and uniform (rows,) float64, top_k (rows,) int64. Temperature 0 takes the largest, the
    first of equals; otherwise `uniform`, in [0, 1), chooses among those that are left in the order of their ids.
    top_k 0 and below keeps all, and top_p adds up the likeliest in that order, of equals the lower id first.
    """
    ids = logits.argmax(axis=1)  # a nan counts as the largest
    largest = logits[np.arange(len(ids)), ids]
    # Whoever only takes the largest has no kernel to wait for.
    if temperature.any():
        _sample(logits, largest, temperature, top_k, top_p, min_p, uniform, ids)
    ids[~np.isfinite(largest)] = -1
    return ids


def log_probabilities(logits: Array, chosen: Array, counts: Array) -> list[dict[int, float]]:
    """logits (rows, vocab) -> for each row, natural log-probabilities of the counts[row] likeliest, and of the chosen.

    Likeliest first, of equals the lower id. chosen, counts (rows,) int64; the largest logits are finite.
    """
    counts = np.minimum(counts, logits.shape[1])
    ids: Array = np.empty((len(logits), counts.max() + 1), np.int64)
    values: Array = np.empty(ids.shape)
    _log_probabilities(logits, logits.max(axis=1), chosen, counts, ids, values)
    return [
        {int(token): float(value) for token, value in zip(tokens[: count + 1], row[: count + 1], strict=True)}
        for tokens, row, count in zip(ids, values, counts, strict=True)
    ]


@parallel_kernel
def _sample(logits, largest, temperature, top_k, top_p, min_p, uniform, ids):
    for m in prange(logits.shape[0]):
        _sample_row(logits, largest, temperature, top_k, top_p, min_p, uniform, ids, np.int64(m))


@kernel
def _sample_row(logits, largest, temperature, top_k, top_p, min_p, uniform, drawn, m):
    if temperature[m] == 0 or not np.isfinite(largest[m]):
        return
    row, peak = logits[m], largest[m]
    # Past these, weights are what they would be at infinity or zero, and the inverse is a float32.
    warmth = min(1e37, max(1e-37, temperature[m]))
    inverse = np.float32(1.0 / warmth)
    ids, values = np.empty(0, np.int64), row
    if 0 < top_k[m] < row.size:
        ids, values = _likeliest(row, _peaks(row), top_k[m])
    if top_p[m] < 1:
        weights, _, total = _weigh(values, peak, inverse, np.float32(0.0))
        if not ids.size:
            # Those of less than this weight have less than 1 - top_p of the total together: none of them stays.
            least = np.log((1.0 - top_p[m]) * total / row.size) - SLACK
            ids, values = _gather(row, _peaks(row), peak + warmth * least)
            weights, _, _ = _weigh(values, peak, inverse, np.float32(0.0))
        ids, values = _first(ids, values, weights, top_p[m] * total)
    # The likeliest one weighs 1, so this is min_p's share of it.
    weights, sums, total = _weigh(values, peak, inverse, np.float32(min_p[m]))
    place = _draw(weights, sums, uniform[m] * total)
    drawn[m] = ids[place] if ids.size else place


@parallel_kernel
def _log_probabilities(logits, largest, chosen, counts, ids, values):
    for m in prange(logits.shape[0]):
        _log_probabilities_of_row(logits, largest, chosen, counts, ids, values, np.int64(m))


@kernel
def _log_probabilities_of_row(logits, largest, chosen, counts, ids, values, m):
    """The count likeliest, in order, and then the chosen one."""
    row, count = logits[m], counts[m]
    _, _, total = _weigh(row, largest[m], np.float32(1.0), np.float32(0.0))
    log_total = largest[m] + np.log(total)
    if count:
        best_ids, best = _likeliest(row, _peaks(row), count)
        for i in range(count):
            at = i
            while at > 0 and values[m, at - 1] < best[i]:
                ids[m, at], values[m, at] = ids[m, at - 1], values[m, at - 1]
                at -= 1
            ids[m, at], values[m, at] = best_ids[i], best[i]
    ids[m, count], values[m, count] = chosen[m], row[chosen[m]]
    for i in range(count + 1):
        values[m, i] -= log_total


@kernel
def _peaks(row):
    """The largest logit of each chunk."""
    peaks = np.empty((row.size + CHUNK - 1) // CHUNK, np.float32)
    for c in range(peaks.size):
        largest, end = splat(np.float32(-np.inf)), min(row.size, (c + 1) * CHUNK)
        for i in range(c * CHUNK, end, LANES):
            largest = maximum(largest, _lanes(row, i, end - i))
        peaks[c] = max_lane(largest)
    return peaks


@kernel
def _lanes(values, i, left):
    """16 values, as unlikely as can be after the last one."""
    if left >= LANES:
        return load(values, i)
    return first_lanes(load_first(values, i, left), splat(np.float32(-np.inf)), left)


@kernel
def _weigh(values, largest, inverse, least):
    """e^((value - largest) · inverse), or zero if that is below `least`; the sum of each chunk, and of all."""
    weights = np.empty(values.size, np.float32)
    sums = np.empty((values.size + CHUNK - 1) // CHUNK)
    whole = 0.0
    for c in range(sums.size):
        total, end = splat(np.float32(0.0)), min(values.size, (c + 1) * CHUNK)
        for i in range(c * CHUNK, end, LANES):
            v = _lanes(values, i, end - i)
            w = zero_below(exp((v - splat(largest)) * splat(inverse)), splat(least))
            total = total + w
            store_first(weights, i, w, end - i)
        sums[c] = sum_lanes(total)
        whole += sums[c]
    return weights, sums, whole


@kernel
def _gather(row, peaks, bound):
    """The logits of at least `bound`, and their ids, in order."""
    ids, values = np.empty(row.size, np.int64), np.empty(row.size, np.float32)
    count = 0
    for c in range(peaks.size):
        if peaks[c] >= bound:
            for i in range(c * CHUNK, min(row.size, (c + 1) * CHUNK)):
                # Written in any case, and the next one over it: cheaper than guessing wrong.
                ids[count], values[count] = i, row[i]
                count += row[i] >= bound
    return ids[:count], values[:count]


@kernel
def _likeliest(row, peaks, count):
    """The `count` largest logits, of equals those of lower ids, and their ids: in the order of ids."""
    bound = -np.inf
    if count <= peaks.size:  # so many chunks reach this
        bound = float(_value(_cutoff(peaks, _ones(peaks.size), float(count))[0]))
    ids, values = _gather(row, peaks, bound)
    return _first(ids, values, _ones(values.size), float(count))


@kernel
def _ones(size):
    ones = np.empty(size, np.float32)
    for i in range(size):
        ones[i] = 1.0
    return ones


@kernel
def _first(ids, values, weights, limit):
    """Those that stay when the largest values are taken until their weights add up to `limit`, in the order of ids."""
    last, before = _cutoff(values, weights, limit)
    count = 0
    for i in range(values.size):
        rank = _rank(values[i])
        if rank < last or (rank == last and before >= limit):
            continue
        if rank == last:
            before += weights[i]
        ids[count], values[count] = ids[i], values[i]
        count += 1
    return ids[:count], values[:count]


@kernel
def _cutoff(values, weights, limit):
    """The rank at which the weights of the largest values come to `limit`, and the weight of what is above it.

    A look at the upper bits finds the bucket in which that happens, further looks the one in the bucket.
    """
    buckets = np.empty(BUCKETS)
    last, before = np.int64(0), 0.0
    for shift, bits in LEVELS:
        for bucket in range(BUCKETS):
            buckets[bucket] = 0.0
        for i in range(values.size):
            rank = _rank(values[i])
            if rank >> (shift + bits) == last:
                buckets[(rank >> shift) & ((1 << bits) - 1)] += weights[i]
        bucket = (1 << bits) - 1
        while bucket and before + buckets[bucket] < limit:
            before += buckets[bucket]
            bucket -= 1
        last = last << bits | bucket
    return last, before


@kernel
def _rank(value):
    """A whole number of 32 bits, larger for a larger float."""
    bits = np.int64(np.float32(value + np.float32(0.0)).view(np.int32))  # -0 becomes 0, which it equals
    return bits + 0x80000000 if bits >= 0 else -1 - bits


@kernel
def _value(rank):
    """The float of this rank."""
    bits = rank - 0x80000000 if rank >= 0x80000000 else -1 - rank
    return np.int32(bits).view(np.float32)


@kernel
def _draw(weights, sums, target):
    """The place at which the weights, added up, pass `target`."""
    c, total = 0, 0.0
    while c < sums.size - 1 and total + sums[c] <= target:
        total += sums[c]
        c += 1
    i = c * CHUNK
    total += weights[i]
    while i < weights.size - 1 and total <= target:
        i += 1
        total += weights[i]
    while weights[i] == 0:  # rounding may have passed the last one that has any
        i -= 1
    return i
