"""RMSNorm and LayerNorm, a row at a time, in float32.

RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467. LayerNorm: Ba et al. 2016, arXiv:1607.06450.
"""

import numpy as np
from numba import prange

from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.simd import LANES, first_lanes, fma, load_first, splat, store_first, sum_lanes

NONE, RMS, LAYER = 0, 1, 2  # the norms that a matrix product can begin with


@kernel
def _rms(x, weight, eps, y, at, H):
    """H numbers of x, the first of them at index `at` of all, normalised into the same place of y, which may be x."""
    squares = splat(np.float32(0.0))
    for h in range(0, H, LANES):
        v = load_first(x, at + h, H - h)
        squares = fma(v, v, squares)
    inverse = splat(np.float32(1.0) / np.sqrt(sum_lanes(squares) / np.float32(H) + eps))
    for h in range(0, H, LANES):
        v = load_first(x, at + h, H - h) * inverse
        store_first(y, at + h, v * load_first(weight, h, H - h), H - h)


@kernel
def _rms_row(x, weight, eps, y, m):
    _rms(x, weight, eps, y, m * x.shape[1], x.shape[1])


@parallel_kernel
def rms_norm(x, weight, eps):
    """x (tokens, hidden), weight (hidden,), both float32 -> weight · x / sqrt(mean(x²) + eps), row by row."""
    y = np.empty_like(x)
    if x.shape[0] == 1:
        _rms_row(x, weight, eps, y, 0)
    else:
        for m in prange(x.shape[0]):
            _rms_row(x, weight, eps, y, np.int64(m))
    return y


@kernel
def _rms_heads(qkv, heads, kv_heads, q_weight, k_weight, eps, m):
    head_dim = q_weight.shape[0]
    for head in range(heads + kv_heads):
        at = m * qkv.shape[1] + head * head_dim
        _rms(qkv, q_weight if head < heads else k_weight, eps, qkv, at, head_dim)


@parallel_kernel
def rms_norm_heads(qkv, heads, kv_heads, q_weight, k_weight, eps):
    """Normalise each query head and each key head of qkv (tokens, (heads + 2·kv_heads)·head_dim) float32 in place.

    q_weight, k_weight (head_dim,): head h becomes weight · h / sqrt(mean(h²) + eps).
    """
    if qkv.shape[0] == 1:
        _rms_heads(qkv, heads, kv_heads, q_weight, k_weight, eps, 0)
    else:
        for m in prange(qkv.shape[0]):
            _rms_heads(qkv, heads, kv_heads, q_weight, k_weight, eps, np.int64(m))


@kernel
def _layer_row(x, weight, bias, eps, y, m):
    H = x.shape[1]
    total = splat(np.float32(0.0))
    for h in range(0, H, LANES):
        total = total + load_first(x, m * H + h, H - h)
    mean = splat(sum_lanes(total) / np.float32(H))
    squares = splat(np.float32(0.0))
    for h in range(0, H, LANES):
        v = first_lanes(load_first(x, m * H + h, H - h) - mean, splat(np.float32(0.0)), H - h)
        squares = fma(v, v, squares)
    inverse = splat(np.float32(1.0) / np.sqrt(sum_lanes(squares) / np.float32(H) + eps))
    for h in range(0, H, LANES):
        v = (load_first(x, m * H + h, H - h) - mean) * inverse
        v = fma(v, load_first(weight, h, H - h), load_first(bias, h, H - h))
        store_first(y, m * H + h, v, H - h)


@parallel_kernel
def layer_norm(x, weight, bias, eps):
    """x (tokens, hidden), weight and bias (hidden,) -> weight · (x - mean) / sqrt(variance + eps) + bias."""
    y = np.empty_like(x)
    if x.shape[0] == 1:
        _layer_row(x, weight, bias, eps, y, 0)
    else:
        for m in prange(x.shape[0]):
            _layer_row(x, weight, bias, eps, y, np.int64(m))
    return y


@kernel
def norm_row(x, norm, weight, bias, eps, y, m):
    """Row m of x, normalised into row m of y; `norm` is RMS or LAYER."""
    if norm == RMS:
        _rms_row(x, weight, eps, y, m)
    else:
        _layer_row(x, weight, bias, eps, y, m)
