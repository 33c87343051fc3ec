"""Numbers for kernels to work on."""

import numpy as np


def random(seed: int, *shape: int) -> np.ndarray:
    """Normally distributed float32, the same for a seed."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
