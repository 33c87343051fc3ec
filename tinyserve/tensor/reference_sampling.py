"""sampling.py and logits_processors.py once more in plain NumPy, written to be read: their specification.

Same names, same arguments, same results to rounding. Nothing here is fast: tests call it, and `LLM.explain`.
"""

import numpy as np

from tinyserve.tensor.sampling import FILTERS

Array = np.ndarray


def sample(logits: Array, settings: Array) -> Array:
    return np.array([_sample_row(row, asked) for row, asked in zip(logits, settings, strict=True)], np.int64)


def _sample_row(row: Array, asked: np.void) -> int:
    if not np.isfinite(row.max()):
        return -1
    if asked["temperature"] == 0:
        return int(row.argmax())
    ids = keep(row, asked)
    cumulative = np.cumsum(probabilities_of(row[ids], asked["temperature"]))
    drawn = np.searchsorted(cumulative, asked["uniform"] * cumulative[-1], side="right")
    return int(ids[min(drawn, len(ids) - 1)])


def keep(row: Array, asked: np.void) -> Array:
    """The ids that are left when each filter has had its say, in order: all of them where nobody has asked."""
    left = np.argsort(-row, kind="stable")  # likeliest first, of equals the lower id
    for name in FILTERS:
        left = left[stays(name, row[left].astype(np.float64), asked[name], asked["temperature"])]
    return np.sort(left)


def stays(name: str, logits: Array, limit: float, temperature: float) -> Array:
    """Which of these logits, the largest first, a filter leaves."""
    everything = np.ones(len(logits), bool)
    match name:
        case "top_n_sigma" if limit > 0:
            distances = logits[logits > -np.inf] - logits[0]
            with np.errstate(over="ignore"):
                return logits >= logits[0] - limit * distances.std()
        case "min_p":
            with np.errstate(divide="ignore", over="ignore"):
                return logits >= logits[0] + temperature * np.log(limit)
        case "top_k":
            return np.arange(len(logits)) < limit if limit > 0 else everything
        case "typical_p" if limit < 1:
            # A token's surprise less the expected one is the expected logit less its own, by the temperature.
            probabilities = probabilities_of(logits, temperature)
            likely = probabilities > 0
            expected = logits[0] + np.sum(probabilities[likely] * (logits[likely] - logits[0]))
            distance = np.abs(logits - expected).astype(np.float32)
            nearest = np.argsort(distance, kind="stable")
            last = min((np.cumsum(probabilities[nearest]) < limit).sum(), len(logits) - 1)
            return distance <= distance[nearest[last]] + temperature * 1e-6  # less is a rounding of the surprise
        case "top_p" if limit < 1:
            # A token stays if those before it do not yet add up to top_p: the first one always does.
            probabilities = probabilities_of(logits, temperature)
            return np.cumsum(probabilities) - probabilities < limit
    return everything


def _log_probabilities(logits: Array, temperature: float) -> Array:
    with np.errstate(over="ignore"):
        scaled = (logits.astype(np.float64) - logits.max()) / temperature
    return scaled - np.log(np.exp(scaled).sum())


def probabilities_of(logits: Array, temperature: float) -> Array:
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
