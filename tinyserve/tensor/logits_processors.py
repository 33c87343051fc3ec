"""What changes logits before a token is chosen: a grammar's mask, and penalties on what has been said.

Both work in place, on rows of (rows, vocab) float32. The other steps are a line of NumPy each (sampler.py).

Keskar et al. 2019, arXiv:1909.05858 (repetition penalty); OpenAI's API (frequency and presence).
"""

import numpy as np

from tinyserve.tensor._jit import cached_kernel, kernel
from tinyserve.tensor.program import instruction
from tinyserve.tensor.simd import LANES, bits_to_lanes, load, load_first, splat, store, store_first
from tinyserve.tensor.thread_pool import next_items

Array = np.ndarray

WORD = 32  # tokens in a word of a mask


def allow(logits: Array, rows: Array, masks: Array) -> None:
    """Make tokens impossible in these rows: token t of a row stays if bit t % 32 of word t // 32 of its mask is 1.

    rows (masked,) int64, masks (masked, words) uint32. Tokens beyond the words do not stay.
    """
    _allow(logits, rows, np.ascontiguousarray(masks))


@instruction
def _allow(team, logits, rows, masks):
    first, last = next_items(team, rows.size)
    while first < last:
        for i in range(first, last):
            _allow_row(logits[rows[i]], masks[i])
        first, last = next_items(team, rows.size)


@kernel
def _allow_row(row, mask):
    for word in range((row.size + WORD - 1) // WORD):
        bits = mask[word] if word < mask.size else np.uint32(0)
        if bits == np.uint32(0xFFFFFFFF):
            continue
        for i in range(word * WORD, min(row.size, (word + 1) * WORD), LANES):
            bias, left = bits_to_lanes(bits, splat(np.float32(0.0)), splat(np.float32(-np.inf))), row.size - i
            if left >= LANES:
                store(row, i, load(row, i) + bias)
            else:
                store_first(row, i, load_first(row, i, left) + bias, left)
            bits >>= np.uint32(LANES)


@cached_kernel  # of one row, by whoever calls: less work than waking a thread for it
def penalise(row, prompt, output, repetition, frequency, presence):
    """Divide positive logits by `repetition` and multiply negative ones, for tokens of prompt and output.

    Then subtract `frequency` for each time a token is in the output, and `presence` if it is there at all. row (vocab,)
    float32, prompt and output token ids int64, penalties float32.
    """
    seen = np.zeros(row.size, np.int32)  # 1, and 2 more for each time in the output
    for tokens in (prompt, output):
        for token in tokens:
            if not seen[token]:
                seen[token] = 1
                row[token] = row[token] * repetition if row[token] < 0 else row[token] / repetition
    for token in output:
        seen[token] += 2
    for token in output:
        if seen[token] > 1:
            row[token] -= frequency * np.float32(seen[token] >> 1)
            row[token] -= presence
            seen[token] = 1
