"""Activations, 16 numbers at a time: SiLU, and GELU in both its forms. matmul.py applies them to its products.

SwiGLU: Shazeer 2020, arXiv:2002.05202. GELU: Hendrycks and Gimpel 2016, arXiv:1606.08415.
"""

import numpy as np

from tinyserve.tensor._jit import kernel
from tinyserve.tensor.simd import absolute, copy_sign, exp, fma, splat


@kernel
def silu_vector(x):
    """x / (1 + e^-x) of an f32x16."""
    return x / (splat(np.float32(1.0)) + exp(splat(np.float32(0.0)) - x))


@kernel
def gelu_tanh_vector(x):
    """GELU of an f32x16 by its tanh approximation (Hugging Face's "gelu_new")."""
    # x/2 · (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2/π) · (x + 0.044715 x³)
    linear, cubic = splat(np.float32(-1.5957691216057308)), splat(np.float32(-1.5957691216057308 * 0.044715))
    return x / (splat(np.float32(1.0)) + exp(x * fma(cubic, x * x, linear)))


@kernel
def gelu_vector(x):
    """GELU of an f32x16 by the error function (Hugging Face's "gelu")."""
    half = splat(np.float32(0.5)) * x
    return fma(half, erf_vector(x * splat(np.float32(0.7071067811865476))), half)


@kernel
def erf_vector(x):
    """The error function of an f32x16, to within 5e-7 (Abramowitz and Stegun 1964, 7.1.26)."""
    a = absolute(x)
    one = splat(np.float32(1.0))
    t = one / fma(splat(np.float32(0.3275911)), a, one)
    p = splat(np.float32(1.061405429))
    p = fma(p, t, splat(np.float32(-1.453152027)))
    p = fma(p, t, splat(np.float32(1.421413741)))
    p = fma(p, t, splat(np.float32(-0.284496736)))
    p = fma(p, t, splat(np.float32(0.254829592)))
    return copy_sign(one - p * t * exp(splat(np.float32(0.0)) - a * a), x)
