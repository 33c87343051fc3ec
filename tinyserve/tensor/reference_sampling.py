"""sampling.py and logits_processors.py once more in plain NumPy, written to be read: their specification.

Same names, same arguments, same results to rounding. Nothing here is fast, and nothing but tests calls it.
"""

import numpy as np

Array = np.ndarray


def sample(
    logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, typical_p: Array, uniform: Array
) -> Array:
    rows = zip(logits, temperature, top_k, top_p, min_p, typical_p, uniform, strict=True)
    return np.array([_sample_row(*row) for row in rows], np.int64)


def _sample_row(
    logits: Array, temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float, uniform: float
) -> int:
    if not np.isfinite(logits.max()):
        return -1
    if temperature == 0:
        return int(logits.argmax())
    ids = keep(logits, temperature, top_k, top_p, min_p, typical_p)
    cumulative = np.cumsum(_probabilities(logits[ids], temperature))
    drawn = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    return int(ids[min(drawn, len(ids) - 1)])


def keep(logits: Array, temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float) -> Array:
    """The ids that are left when each filter has had its say, in order: all of them where nobody has asked."""
    order = np.argsort(-logits, kind="stable")  # likeliest first, of equals the lower id
    wide = logits.astype(np.float64)
    with np.errstate(divide="ignore", over="ignore"):
        order = order[wide[order] >= wide.max() + temperature * np.log(min_p)]
    if top_k > 0:
        order = order[:top_k]
    if typical_p < 1:
        # A token's surprise less the expected one is the expected logit less its own, by the temperature.
        probabilities = _probabilities(wide[order], temperature)
        likely = probabilities > 0
        expected = wide.max() + np.sum(probabilities[likely] * (wide[order][likely] - wide.max()))
        distance = np.abs(wide[order] - expected).astype(np.float32)
        nearest = np.argsort(distance, kind="stable")
        last = min((np.cumsum(probabilities[nearest]) < typical_p).sum(), len(order) - 1)
        order = order[distance <= distance[nearest[last]] + temperature * 1e-6]  # less is a rounding of the surprise
    if top_p < 1:
        # A token stays if those before it do not yet add up to top_p: the first one always does.
        probabilities = _probabilities(wide[order], temperature)
        order = order[np.cumsum(probabilities) - probabilities < top_p]
    return np.sort(order)


def _log_probabilities(logits: Array, temperature: float) -> Array:
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - logits.max()) / temperature
    return scaled - np.log(np.exp(scaled).sum())


def _probabilities(logits: Array, temperature: float) -> Array:
    return np.exp(_log_probabilities(logits, temperature))


def log_probabilities(logits: Array, chosen: Array, counts: Array) -> list[dict[int, tuple[float, int]]]:
    results = []
    for row, token, count in zip(logits, chosen, counts, strict=True):
        normalised = _log_probabilities(row, 1.0)
        best = np.argsort(-normalised, kind="stable")[:count]
        ranks = {int(token): int((row > row[token]).sum()) + 1} | {int(i): r + 1 for r, i in enumerate(best)}
        results.append({int(i): (float(normalised[i]), ranks[int(i)]) for i in [*best, token]})
    return results


def allow(logits: Array, rows: Array, masks: Array) -> None:
    vocab = logits.shape[1]
    for row, mask in zip(rows, masks, strict=True):
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab]
        logits[row, : bits.size][bits == 0] = -np.inf
        logits[row, bits.size :] = -np.inf


def penalise(row: Array, prompt: Array, output: Array, repetition: float, frequency: float, presence: float) -> None:
    seen = np.zeros(len(row), bool)
    seen[prompt] = seen[output] = True
    counts = np.bincount(output, minlength=len(row)).astype(np.float32)
    row[seen] = np.where(row < 0, row * np.float32(repetition), row / np.float32(repetition))[seen]
    row -= np.float32(frequency) * counts
    row -= np.float32(presence) * (counts > 0)
