"""RMSNorm and LayerNorm, a row at a time, in float32.

RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467. LayerNorm: Ba et al. 2016, arXiv:1607.06450.
"""

from typing import NamedTuple

import numpy as np

from tinyserve.tensor._jit import kernel
from tinyserve.tensor.program import constant, empty, instruction
from tinyserve.tensor.simd import LANES, first_lanes, fma, load_first, splat, store_first, sum_lanes
from tinyserve.tensor.thread_pool import own_items

NONE, RMS, LAYER = 0, 1, 2  # the norms that a matrix product can begin with


@constant
class Norm(NamedTuple):
    """A norm that a product begins with: its kind, weight and bias (inputs,), which may be empty, and epsilon."""

    kind: int
    weight: np.ndarray
    bias: np.ndarray
    eps: np.float32


NO_NORM = Norm(NONE, np.empty(0, np.float32), np.empty(0, np.float32), np.float32(0.0))


@kernel
def _rms(x, at, weight, eps, y, y_at, H):
    """H numbers of x from a flat index on, normalised into y from a flat index on, which may be the same."""
    squares = splat(np.float32(0.0))
    for h in range(0, H, LANES):
        v = load_first(x, at + h, H - h)
        squares = fma(v, v, squares)
    inverse = splat(np.float32(1.0) / np.sqrt(sum_lanes(squares) / np.float32(H) + eps))
    for h in range(0, H, LANES):
        v = load_first(x, at + h, H - h) * inverse
        store_first(y, y_at + h, v * load_first(weight, h, H - h), H - h)


@instruction
def rms_norm_heads(team, qkv, heads, kv_heads, q_weight, k_weight, eps):
    """Normalise each query head and each key head of qkv (tokens, (heads + 2·kv_heads)·head_dim) float32 in place.

    q_weight, k_weight (head_dim,): head h becomes weight · h / sqrt(mean(h²) + eps).
    """
    head_dim, normed = q_weight.shape[0], heads + kv_heads
    first, last = own_items(team, qkv.shape[0] * normed)
    for item in range(first, last):
        m, head = item // normed, item % normed
        at = m * qkv.shape[1] + head * head_dim
        _rms(qkv, at, q_weight if head < heads else k_weight, eps, qkv, at, head_dim)


@kernel
def _layer(x, at, norm, y, y_at, H):
    total = splat(np.float32(0.0))
    for h in range(0, H, LANES):
        total = total + load_first(x, at + h, H - h)
    mean = splat(sum_lanes(total) / np.float32(H))
    squares = splat(np.float32(0.0))
    for h in range(0, H, LANES):
        v = first_lanes(load_first(x, at + h, H - h) - mean, splat(np.float32(0.0)), H - h)
        squares = fma(v, v, squares)
    inverse = splat(np.float32(1.0) / np.sqrt(sum_lanes(squares) / np.float32(H) + norm.eps))
    for h in range(0, H, LANES):
        v = (load_first(x, at + h, H - h) - mean) * inverse
        v = fma(v, load_first(norm.weight, h, H - h), load_first(norm.bias, h, H - h))
        store_first(y, y_at + h, v, H - h)


@kernel
def norm_row(x, m, norm, y, row):
    """Row m of x, normalised into a row of y, which may be x."""
    H = x.shape[1]
    if norm.kind == RMS:
        _rms(x, m * H, norm.weight, norm.eps, y, row * H, H)
    else:
        _layer(x, m * H, norm, y, row * H, H)


@instruction
def _norm_rows(team, x, norm, y):
    first, last = own_items(team, x.shape[0])
    for m in range(first, last):
        norm_row(x, m, norm, y, m)


def norm_rows(x: np.ndarray, norm: Norm) -> np.ndarray:
    """x (rows, columns) float32, each row normalised: weight · x / sqrt(mean(x²) + eps), or LayerNorm's."""
    y = empty(x.shape)
    _norm_rows(x, norm, y)
    return y
