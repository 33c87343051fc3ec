"""Rotary position embeddings: the halves of each head turn by an angle that grows with the position.

Su et al. 2021, arXiv:2104.09864, in Hugging Face's "rotate half" convention. Scaling rules are the caller's: what comes
in are frequencies.
"""

from typing import NamedTuple

import numpy as np

from tinyserve.tensor._jit import kernel
from tinyserve.tensor.program import constant
from tinyserve.tensor.simd import LANES, fma, load_first, splat, store_first


@constant
class RopeTable(NamedTuple):
    """Cosines and sines of the angles at each position, or two empty arrays where nothing is rotated."""

    cosines: np.ndarray  # (positions, head_dim/2) float32
    sines: np.ndarray


def rope_table(frequencies: np.ndarray, positions: int) -> RopeTable:
    """frequencies (head_dim/2,), in radians a position -> the angles of so many positions."""
    angles = np.outer(np.arange(positions, dtype=np.float32), frequencies.astype(np.float32))
    return RopeTable(np.cos(angles), np.sin(angles))


@kernel
def rotate_heads(x, table, position, first, heads, head_dim):
    """Rotate, in place, `heads` heads from flat index `first` of x on, float32."""
    half = head_dim // 2
    zero = splat(np.float32(0.0))
    for at in range(first, first + heads * head_dim, head_dim):
        for d in range(0, half, LANES):
            count = half - d
            c = load_first(table.cosines, position * half + d, count)
            s = load_first(table.sines, position * half + d, count)
            a, b = load_first(x, at + d, count), load_first(x, at + half + d, count)
            store_first(x, at + d, fma(a, c, zero - b * s), count)
            store_first(x, at + half + d, fma(b, c, a * s), count)
