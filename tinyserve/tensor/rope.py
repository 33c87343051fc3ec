"""Rotary position embeddings: the halves of each head turn by an angle that grows with the position.

Su et al. 2021, arXiv:2104.09864, in Hugging Face's "rotate half" convention. Scaling rules are the caller's: what comes
in are frequencies.
"""

import numpy as np

from tinyserve.tensor._jit import kernel
from tinyserve.tensor.simd import LANES, fma, load_first, splat, store_first


def rope_table(frequencies: np.ndarray, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """frequencies (head_dim/2,) -> cosines and sines (positions, head_dim/2), all float32."""
    angles = np.outer(np.arange(positions, dtype=np.float32), frequencies.astype(np.float32))
    return np.cos(angles), np.sin(angles)


@kernel
def rotate_row(x, cosines, sines, position, heads, head_dim, m):
    """Rotate, in place, the first `heads` heads of row m of x (tokens, at least heads · head_dim) float32."""
    half = head_dim // 2
    zero = splat(np.float32(0.0))
    for head in range(heads):
        at = m * x.shape[1] + head * head_dim
        for d in range(0, half, LANES):
            count = half - d
            c = load_first(cosines, position * half + d, count)
            s = load_first(sines, position * half + d, count)
            a, b = load_first(x, at + d, count), load_first(x, at + half + d, count)
            store_first(x, at + d, fma(a, c, zero - b * s), count)
            store_first(x, at + half + d, fma(b, c, a * s), count)
