"""Numbers for kernels to work on, and what they should look like afterwards."""

import numpy as np

from tinyserve.tensor.quant import IntegerWeights


def random(seed: int, *shape: int) -> np.ndarray:
    """Normally distributed float32, the same for a seed."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def assert_drawn_from(probabilities: np.ndarray, ids: np.ndarray) -> None:
    """Chi-square: fails for one in a few million samples of these probabilities, so with a fixed seed never."""
    counts = np.bincount(ids, minlength=len(probabilities))
    expected = len(ids) * probabilities
    assert not counts[expected == 0].any()
    rare = expected < 10  # together in one class
    classes = [*zip(counts[~rare], expected[~rare], strict=True), (counts[rare].sum(), expected[rare].sum())]
    classes = [(count, share) for count, share in classes if share > 0]
    freedom = len(classes) - 1
    assert freedom >= 4
    statistic = sum((count - share) ** 2 / share for count, share in classes)
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def with_minimums(packed, shape):
    """The same 4-bit weights with random minimums beside their scales."""
    whole = IntegerWeights.empty(shape, 4, packed.group, has_minimums=True)
    whole.scales[:], whole.integers[:] = packed.scales, packed.integers
    whole.minimums[:] = random(3, *whole.minimums.shape).astype(np.float16).view(np.int16)
    return whole
