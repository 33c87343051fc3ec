"""From logits to a token: greedy, or drawn from what is left when each filter has had its say.

vLLM's chain and two filters more. PROCESSORS (logits processors: sampler.py) change logits. Temperature 0 takes the
largest then, without filters; else logits are divided by the temperature, FILTERS leave out tokens, and one is drawn by
its share of what is left. What a request does not ask for is passed over.

Each filter takes probabilities among the tokens that the one before it has left. Log-probabilities are of the model's
own logits, before all of it.

Meister et al. 2022, arXiv:2202.00666 (typical_p); Holtzman et al. 2020, arXiv:1904.09751 (top_p); Nguyen et al. 2024,
arXiv:2407.01082 (min_p); Tang et al. 2024, arXiv:2411.07641 (top_n_sigma, as in llama.cpp). A row's answer depends on
its own logits and its own random number. Nothing is sorted: what a filter keeps is everything above one number, and
that number is found by its bits.

Weights, e^((logit - largest) / temperature), are float32 and added up in chunks, the chunks in float64. Probabilities
are right to about a part in a million, which is what a logit's own rounding does to them.
"""

import numpy as np

from tinyserve.tensor._jit import kernel
from tinyserve.tensor.program import allocating_instruction, empty, instruction
from tinyserve.tensor.simd import (
    LANES,
    bits_at_least,
    bits_to_lanes,
    exp,
    first_bit,
    first_lanes,
    fma,
    larger,
    load,
    load_first,
    max_lane,
    maximum,
    splat,
    store_first,
    sum_lanes,
)
from tinyserve.tensor.thread_pool import next_items

Array = np.ndarray

PROCESSORS = (  # in this order, behind the grammar's mask
    "allowed_token_ids",  # no other token
    "banned_token_ids",  # none of these
    "bad_words",  # no token that would complete one of these
    "logit_bias",  # is added
    "min_tokens",  # no token that ends an answer, as long as there are fewer
    "penalties",  # repetition on the tokens of prompt and answer, then frequency and presence on those of the answer
)
FILTERS = (  # in this order; the default of SamplingParams keeps all
    "top_n_sigma",  # tokens whose logit is so many standard deviations of all of them below the largest, or nearer
    "min_p",  # tokens at least this probable relative to the likeliest
    "top_k",  # so many of the likeliest
    "typical_p",  # those whose surprise is nearest to the expected one, until they have this probability
    "top_p",  # the likeliest, until they have this probability
)
# What is asked for a row. `uniform`, in [0, 1), chooses among the tokens that are left, in the order of their ids.
SETTINGS = np.dtype([(name, np.float64) for name in ("temperature", *FILTERS, "uniform")])

CHUNK = 256  # logits that have a largest one and a sum of weights of their own
EVERY_LANE = (1 << LANES) - 1
ROUNDING = 1e-6  # surprises that differ by less are equal: which of two is nearer to the mean is chance then
SLACK = 1e-3  # what rounding can do to the logarithm of a weight, generously


def sample(logits: Array, settings: Array, largest: tuple[Array, Array] | None = None) -> Array:
    """logits (rows, vocab) float32 -> a token id for each row (rows,) int64; -1 where the largest is no finite number.

    settings (rows,) of SETTINGS; largest is what `find_largest` said of these logits, if it was asked before, and its
    ids become those that are returned. Temperature 0 takes the largest, the first of equals, and looks at no other. Of
    equals top_k and top_p take the lower id first; typical_p keeps all that are as near as the last one.
    """
    ids, peaks = largest or find_largest(logits)
    if settings["temperature"].any():
        _sample(logits, peaks, settings, ids)
    return ids


def find_largest(logits: Array) -> tuple[Array, Array]:
    """The id of each row's largest logit (rows,) int64, the first of equals; and each chunk's largest (rows, chunks).

    An id is -1 where the largest is no finite number, or anything in the row is no number.
    """
    rows, vocab = logits.shape
    ids, peaks = empty(rows, np.int64), empty((rows, (vocab + CHUNK - 1) // CHUNK))
    _find_peaks(logits, peaks)
    _choose(logits, peaks, ids)
    return ids, peaks


def log_probabilities(logits: Array, chosen: Array, counts: Array) -> list[dict[int, tuple[float, int]]]:
    """logits (rows, vocab) -> for each row the counts[row] likeliest tokens, and the chosen one, likeliest first.

    Of each the natural log-probability and its rank, 1 for the largest; of equals the lower id comes first. chosen,
    counts (rows,) int64; the largest logits are finite.
    """
    counts = np.minimum(counts, logits.shape[1])
    ids: Array = np.empty((len(logits), counts.max() + 1), np.int64)
    values: Array = np.empty(ids.shape)
    ranks: Array = np.empty(len(logits), np.int64)
    _log_probabilities(logits, logits.max(axis=1), chosen, counts, ids, values, ranks)
    found = []
    for tokens, row, rank, count in zip(ids.tolist(), values.tolist(), ranks.tolist(), counts.tolist(), strict=True):
        best = {tokens[i]: (row[i], i + 1) for i in range(count)}
        found.append(best | ({} if tokens[count] in best else {tokens[count]: (row[count], rank)}))
    return found


@instruction
def _find_peaks(team, logits, peaks):
    """The largest logit of each chunk; nan where there is a nan or an infinity, but not for impossible tokens."""
    rows, chunks = peaks.shape
    first, last = next_items(team, rows * chunks)
    while first < last:
        m, c = first // chunks, first % chunks
        for _ in range(first, last):
            peaks[m, c] = _peak(logits[m], c)
            c += 1
            if c == chunks:
                m, c = m + 1, 0
        first, last = next_items(team, rows * chunks)


@instruction
def _choose(team, logits, peaks, ids):
    first, last = next_items(team, ids.size)
    while first < last:
        for m in range(first, last):
            ids[m] = _place_of_largest(logits[m], peaks[m])
        first, last = next_items(team, ids.size)


@allocating_instruction
def _sample(team, logits, peaks, settings, ids):
    """Draw for the rows that have a temperature: ids come as those of the largest, or -1."""
    first, last = next_items(team, ids.size)
    while first < last:
        for m in range(first, last):
            if settings[m].temperature != 0 and ids[m] >= 0:
                ids[m] = _draw_from_row(logits[m], peaks[m], settings[m], ids[m])
        first, last = next_items(team, ids.size)


@kernel
def _draw_from_row(row, peaks, asked, largest):
    ids, values = keep(row, peaks, row[largest], asked)
    weights, sums, total = _weigh(values, row[largest], _inverse(asked.temperature))
    place = _draw(weights, sums, asked.uniform * total)
    return ids[place] if ids.size else place


@kernel
def keep(row, peaks, peak, asked):
    """The ids that the filters leave and their logits, in order; no ids, and the row, where nobody has asked.

    peaks are the largest of each chunk, peak is the largest of all; asked is one of SETTINGS.
    """
    warmth, inverse = _warmth(asked.temperature), _inverse(asked.temperature)
    ids, values = np.empty(0, np.int32), row
    # The first filters take the likeliest, so the strictest of their bounds is one for all.
    count = np.int64(asked.top_k) if 0 < asked.top_k < row.size else row.size
    bound = -np.inf
    if asked.top_n_sigma > 0:
        bound = peak - asked.top_n_sigma * _deviation(row, peak)
    if asked.min_p > 0:
        bound = max(bound, peak + warmth * np.log(asked.min_p))
    if count < row.size or bound > -np.inf:
        ids, values = _likeliest(row, peaks, count, bound)
    if asked.typical_p < 1:
        weights, _, total = _weigh(values, peak, inverse)
        mean = _mean(values, weights, peak, inverse) / total
        if not ids.size:
            # Whatever is likelier than the mean is nearer to it than this, and what is farther below weighs too little.
            least = min(2 * mean, np.log((1.0 - asked.typical_p) * total / row.size)) - SLACK
            ids, values = _gather(row, peaks, peak + warmth * least)
            weights, _, _ = _weigh(values, peak, inverse)
        ids, values = _nearest(ids, values, weights, peak + warmth * mean, asked.typical_p * total, warmth * ROUNDING)
    if asked.top_p < 1:
        weights, _, total = _weigh(values, peak, inverse)
        if not ids.size:
            # Those of less than this weight have less than 1 - top_p of the total together: none of them stays.
            least = np.log((1.0 - asked.top_p) * total / row.size) - SLACK
            ids, values = _gather(row, peaks, peak + warmth * least)
            weights, _, _ = _weigh(values, peak, inverse)
        ids, values = _first(ids, values, weights, asked.top_p * total)
    return ids, values


@kernel
def _warmth(temperature):
    """The temperature; past these bounds, weights are what they would be at infinity or zero."""
    return min(1e37, max(1e-37, temperature))


@kernel
def _inverse(temperature):
    return np.float32(1.0 / _warmth(temperature))


@allocating_instruction
def _log_probabilities(team, logits, largest, chosen, counts, ids, values, ranks):
    first, last = next_items(team, ranks.size)
    while first < last:
        for m in range(first, last):
            _log_probabilities_of_row(logits, largest, chosen, counts, ids, values, ranks, m)
        first, last = next_items(team, ranks.size)


@kernel
def _log_probabilities_of_row(logits, largest, chosen, counts, ids, values, ranks, m):
    """The count likeliest, in order, and then the chosen one, whose rank is one more than there are larger."""
    row, count = logits[m], counts[m]
    _, _, total = _weigh(row, largest[m], np.float32(1.0))
    log_total = largest[m] + np.log(total)
    if count:
        peaks = np.empty((row.size + CHUNK - 1) // CHUNK, np.float32)
        for c in range(peaks.size):
            peaks[c] = _peak(row, c)
        best_ids, best = _likeliest(row, peaks, count, -np.inf)
        for i in range(count):
            at = i
            while at > 0 and values[m, at - 1] < best[i]:
                ids[m, at], values[m, at] = ids[m, at - 1], values[m, at - 1]
                at -= 1
            ids[m, at], values[m, at] = best_ids[i], best[i]
    ids[m, count], values[m, count] = chosen[m], row[chosen[m]]
    larger_ones = 0
    for i in range(row.size):
        larger_ones += row[i] > row[chosen[m]]
    ranks[m] = larger_ones + 1
    for i in range(count + 1):
        values[m, i] -= log_total


@kernel
def _peak(row, c):
    """The largest logit of a chunk, or nan where there is a nan or an infinity, but not for impossible tokens."""
    largest, lowest = splat(np.float32(-np.inf)), splat(np.float32(-3e38))
    check = splat(np.float32(0.0))
    end = min(row.size, (c + 1) * CHUNK)
    for i in range(c * CHUNK, end, LANES):
        x = _lanes(row, i, end - i)
        largest = larger(x, largest)
        check = fma(larger(lowest, x), splat(np.float32(0.0)), check)
    return max_lane(largest) + sum_lanes(check)


@kernel
def _place_of_largest(row, peaks):
    """-1 where there is none, or anything in the row is no number."""
    highest, at = np.float32(-np.inf), -1
    for c in range(peaks.size):
        if np.isnan(peaks[c]):
            return -1
        if peaks[c] > highest:
            highest, at = peaks[c], c
    if at < 0:
        return -1
    i = at * CHUNK
    while row[i] != highest:
        i += 1
    return i


@kernel
def _lanes(values, i, left, other=-np.inf):
    """16 values, or the `left` last ones and another number in their place."""
    if left >= LANES:
        return load(values, i)
    return first_lanes(load_first(values, i, left), splat(np.float32(other)), left)


@kernel
def _weigh(values, largest, inverse):
    """e^((value - largest) · inverse); the sum of each chunk, and of all."""
    weights = np.empty(values.size, np.float32)
    sums = np.empty((values.size + CHUNK - 1) // CHUNK)
    whole = 0.0
    for c in range(sums.size):
        total, end = splat(np.float32(0.0)), min(values.size, (c + 1) * CHUNK)
        for i in range(c * CHUNK, end, LANES):
            w = exp((_lanes(values, i, end - i) - splat(largest)) * splat(inverse))
            total = total + w
            store_first(weights, i, w, end - i)
        sums[c] = sum_lanes(total)
        whole += sums[c]
    return weights, sums, whole


@kernel
def _mean(values, weights, largest, inverse):
    """The sum of weight · (value - largest) · inverse: of the logarithms of weights, each as often as it comes."""
    whole = 0.0
    for start in range(0, values.size, CHUNK):
        total, end = splat(np.float32(0.0)), min(values.size, start + CHUNK)
        for i in range(start, end, LANES):
            x = (_lanes(values, i, end - i) - splat(largest)) * splat(inverse)
            # What weighs nothing adds nothing, be it infinitely unlikely.
            total = fma(load_first(weights, i, end - i), maximum(x, splat(np.float32(-100.0))), total)
        whole += sum_lanes(total)
    return whole


@kernel
def _deviation(row, peak):
    """The standard deviation of the logits of possible tokens, of all of them and not of a sample."""
    count, distance = _moment(row, peak, np.float32(1.0), False)
    mean = min(distance / count, -1e-37)  # the mean's distance from the peak, in which the squares are measured
    _, squares = _moment(row, np.float32(peak + mean), np.float32(1.0 / mean), True)
    return -mean * np.sqrt(squares / count)


@kernel
def _moment(row, center, inverse, squared):
    """How many tokens are possible, and the sum of their (logit - center) · inverse, or of its square."""
    count, whole = 0.0, 0.0
    zero, one, lowest = splat(np.float32(0.0)), splat(np.float32(1.0)), splat(np.float32(-3e38))
    for start in range(0, row.size, CHUNK):
        possible, total, end = zero, zero, min(row.size, start + CHUNK)
        for i in range(start, end, LANES):
            logits = _lanes(row, i, end - i)
            x = (logits - splat(center)) * splat(inverse)
            bits = np.uint32(bits_at_least(logits, lowest))
            possible = possible + bits_to_lanes(bits, one, zero)
            total = total + bits_to_lanes(bits, x * x if squared else x, zero)
        count += sum_lanes(possible)
        whole += sum_lanes(total)
    return count, whole


@kernel
def _gather(row, peaks, bound):
    """The logits of at least `bound`, and their ids, in order."""
    least = np.float32(bound)
    if least < bound:
        least = np.nextafter(least, np.float32(np.inf))
    room = 0
    for c in range(peaks.size):
        room += CHUNK * (peaks[c] >= least)
    ids, values = np.empty(min(room, row.size), np.int32), np.empty(min(room, row.size), np.float32)
    count = 0
    for c in range(peaks.size):
        if peaks[c] >= least:
            end = min(row.size, (c + 1) * CHUNK)
            for i in range(c * CHUNK, end, LANES):
                bits = bits_at_least(_lanes(row, i, end - i, np.nan), splat(least))  # a nan is at least nothing
                if bits == EVERY_LANE:
                    for lane in range(LANES):
                        ids[count + lane], values[count + lane] = i + lane, row[i + lane]
                    count, bits = count + LANES, 0
                while bits:
                    at = i + first_bit(bits)
                    ids[count], values[count] = at, row[at]
                    count += 1
                    bits &= bits - 1
    return ids[:count], values[:count]


@kernel
def _likeliest(row, peaks, count, bound):
    """The `count` largest logits of at least `bound`, of equals those of lower ids, and their ids: in order of ids."""
    if count <= peaks.size:  # so many chunks reach this
        bound = max(bound, float(_value(_cutoff(peaks, _ones(peaks.size), float(count))[0])))
    ids, values = _gather(row, peaks, bound)
    if count < ids.size:
        ids, values = _first(ids, values, _ones(values.size), float(count))
    return ids, values


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
def _nearest(ids, values, weights, center, limit, rounding):
    """Those that stay when values are taken by their distance until their weights add up to `limit`; order of ids.

    What is farther than the last one by no more than `rounding` is as near.
    """
    nearness = np.empty(values.size, np.float32)
    for i in range(values.size):
        nearness[i] = -abs(values[i] - center)
    last = _value(_cutoff(nearness, weights, limit)[0]) - rounding
    count = 0
    for i in range(values.size):
        ids[count], values[count] = ids[i], values[i]
        count += nearness[i] >= last
    return ids[:count], values[:count]


@kernel
def _cutoff(values, weights, limit):
    """The rank at which the weights of the largest values come to `limit`, and the weight of what is above it.

    A look at the upper bits finds the bucket in which that happens, further looks the one in the bucket.
    """
    # A few values are looked at oftener, with fewer buckets to empty.
    width = 8 if values.size <= 1 << 10 else 11
    buckets = np.empty(1 << width)
    last, before, shift = np.int64(0), 0.0, 32
    while shift:
        bits = min(width, shift)
        shift -= bits
        for bucket in range(1 << bits):
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
