"""One step of every dot product, compared with NumPy: run in a process of its own before a path is relied on.

`python -m tinyserve.tensor.probe` ends with 0 where the paths of TINYSERVE_DOT_PRODUCT and TINYSERVE_BFLOAT16 work.
"""

import numpy as np

from tinyserve.tensor import dot_product
from tinyserve.tensor._jit import cached_kernel
from tinyserve.tensor.quant import store_activations
from tinyserve.tensor.simd import load, round_to_int, splat, store
from tinyserve.tensor.tiles import (
    begin_part,
    dot_rows,
    end_part,
    fma_rows,
    inputs_per_load,
    scaled_rows,
    start_rows,
    zeros,
)


@cached_kernel
def dot_32(w, x, kind, out):
    """w (bytes of 16 outputs by 32 inputs), x (32,) whole numbers in float32, kind as in matmul.py -> out (16,)."""
    q, start, one = np.empty(32, kind.dtype), np.zeros(1, np.int32), np.ones(1, np.float32)
    for k in range(0, 32, 16):
        store_activations(q, k, round_to_int(load(x, k)))
    sums = start_rows(1, 1, q, start, 0, 1)
    part = begin_part(sums, w, q)
    for k in range(0, 32, inputs_per_load(w)):
        part = dot_rows(part, 1, w, 64 * (k // inputs_per_load(w)), 0, q, k, 0)
    sums = end_part(sums, part)
    (total,) = scaled_rows(zeros(1), sums, (splat(np.float32(1.0)),), one, 0, 1)
    store(out, 0, total)


def check() -> None:
    """Raise AssertionError if a product is not exact."""
    random = np.random.default_rng(0)
    for weight_type, activation_type in (
        (np.int8, np.int16),
        (np.int8, np.int8),
        (np.uint8, np.int16),
        (np.uint8, np.int8),
    ):
        if dot_product.PAIRS and (weight_type, activation_type) == (np.int8, np.int8):
            continue  # kept as int16 there
        largest = 32512 if activation_type is np.int16 else 127
        weights = random.choice([0, 1, 255] if weight_type is np.int8 else [0, 1, 15], (16, 32)).astype(np.int64)
        x = random.choice([-largest, -1, 0, 77, largest], 32)
        fours = weights.reshape(16, 8, 4).transpose(1, 0, 2).reshape(8, 64)
        packed = fours if weight_type is np.int8 else fours[::2] | fours[1::2] << 4
        signed = weights - 128 if dot_product.SIGNED and weight_type is np.int8 else weights
        out = np.empty(16, np.float32)
        dot_32(
            packed.astype(np.uint8).view(weight_type).ravel(), x.astype(np.float32), np.empty(0, activation_type), out
        )
        np.testing.assert_array_equal(out, (signed @ x).astype(np.float32))


@cached_kernel
def dot_pairs(total, w, x, out):
    """total (16,) float32 + w (16,) · x (1,), words of two bfloat16 -> out (16,)."""
    (products,) = fma_rows((load(total, 0),), (load(w, 0),), x, 0, 0)
    store(out, 0, products)


def check_bfloat16() -> None:
    """Raise AssertionError if sums are rounded in another way, or another order, than bfloat16.py says."""
    random, out = np.random.default_rng(0), np.empty(16, np.float32)
    for _ in range(200):
        halves = random.integers(110, 144, (17, 2)) << 7 | random.integers(0, 128, (17, 2))
        halves = (halves | random.integers(0, 2, (17, 2)) << 15).astype(np.uint16)
        total = np.ldexp(random.standard_normal(16), random.integers(-20, 20, 16)).astype(np.float32)
        words = halves.view(np.uint32).ravel()
        dot_pairs(total, words[:16], words[16:], out)
        floats = (halves.astype(np.uint32) << 16).view(np.float32).astype(np.longdouble)  # whose products are exact
        expected = (floats[:16, 1] * floats[16, 1] + total).astype(np.float32)
        expected = (floats[:16, 0] * floats[16, 0] + expected).astype(np.float32)
        np.testing.assert_array_equal(out, expected)


if __name__ == "__main__":
    check()
    check_bfloat16()
