"""Activations: SiLU·up of the gated MLP, and GELU in both its forms.

SwiGLU: Shazeer 2020, arXiv:2002.05202. GELU: Hendrycks and Gimpel 2016, arXiv:1606.08415.
"""

import math

import numpy as np
from numba import prange

from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.simd import LANES, exp, fma, load_first, splat, store_first


@kernel
def _silu_mul_row(x, y, m):
    I = y.shape[1]
    zero, one = splat(np.float32(0.0)), splat(np.float32(1.0))
    for i in range(0, I, LANES):
        gate = load_first(x, m * 2 * I + i, I - i)
        up = load_first(x, m * 2 * I + I + i, I - i)
        store_first(y, m * I + i, gate / (one + exp(zero - gate)) * up, I - i)


@parallel_kernel
def silu_mul(x):
    """x (tokens, 2·I) float32, gate then up -> silu(gate) · up (tokens, I)."""
    y = np.empty((x.shape[0], x.shape[1] // 2), np.float32)
    if x.shape[0] == 1:
        _silu_mul_row(x, y, 0)
    else:
        for m in prange(x.shape[0]):
            _silu_mul_row(x, y, m)
    return y


@kernel
def _gelu_tanh_row(x, y, m):
    I = x.shape[1]
    one = splat(np.float32(1.0))
    # x/2 · (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2/π) · (x + 0.044715 x³)
    linear, cubic = splat(np.float32(-1.5957691216057308)), splat(np.float32(-1.5957691216057308 * 0.044715))
    for i in range(0, I, LANES):
        v = load_first(x, m * I + i, I - i)
        minus_2u = v * fma(cubic, v * v, linear)
        store_first(y, m * I + i, v / (one + exp(minus_2u)), I - i)


@parallel_kernel
def gelu_tanh(x):
    """x (tokens, I) float32 -> GELU by its tanh approximation (Hugging Face's "gelu_new")."""
    y = np.empty_like(x)
    if x.shape[0] == 1:
        _gelu_tanh_row(x, y, 0)
    else:
        for m in prange(x.shape[0]):
            _gelu_tanh_row(x, y, m)
    return y


@parallel_kernel
def gelu(x):
    """x (tokens, I) float32 -> GELU by the error function (Hugging Face's "gelu")."""
    y = np.empty_like(x)
    for m in prange(x.shape[0]):
        for i in range(x.shape[1]):
            v = x[m, i]
            y[m, i] = np.float32(0.5) * v * (np.float32(1.0) + math.erf(v * np.float32(0.7071067811865476)))
    return y
