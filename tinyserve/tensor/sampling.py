"""From logits to a token: greedy, or drawn from what temperature, top-k, top-p and min-p leave.

Holtzman et al. 2020, arXiv:1904.09751 (top-p); Nguyen et al. 2024, arXiv:2407.01082 (min-p). One row at a time, so
that a request's draw depends on its own logits and its own generator.
"""

import numpy as np

Array = np.ndarray


def sample(
    logits: Array, temperature: float, top_k: int, top_p: float, min_p: float, generator: np.random.Generator
) -> int:
    """logits (vocab,) float32 -> a token id. Temperature 0 is the most likely one, the first of equals."""
    if temperature == 0:
        return int(logits.argmax())
    wide = logits.astype(np.float64)
    ids, scaled = np.arange(logits.size), (wide - wide.max()) / temperature
    if 0 < top_k < logits.size:
        ids = np.sort(np.argpartition(-scaled, top_k - 1)[:top_k])
        scaled = scaled[ids]
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        # A token stays if those before it do not yet add up to top_p: the first one always does.
        before = np.cumsum(probabilities[order]) - probabilities[order]
        keep = np.sort(order[before < top_p])
        ids, probabilities = ids[keep], probabilities[keep]
    if min_p > 0:
        keep = np.flatnonzero(probabilities >= min_p * probabilities.max())
        ids, probabilities = ids[keep], probabilities[keep]
    cumulative = np.cumsum(probabilities)
    drawn = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
    return int(ids[min(drawn, len(ids) - 1)])


def log_probabilities(logits: Array, chosen: int, count: int) -> dict[int, float]:
    """logits (vocab,) -> the `count` most likely tokens and the chosen one, with natural log-probabilities."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max()
    normalised = shifted - np.log(np.exp(shifted).sum())
    best: Array | list[int] = np.argsort(-normalised, kind="stable")[:count] if count else []
    return {int(token): float(normalised[token]) for token in dict.fromkeys([*best, chosen])}
