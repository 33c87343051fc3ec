"""One step of every integer dot product, compared with NumPy: run in a process of its own before a path is relied on.

`python -m tinyserve.tensor.probe` ends with 0 where the path that TINYSERVE_DOT_PRODUCT names works.
"""

import numpy as np

from tinyserve.tensor import dot_product
from tinyserve.tensor._jit import cached_kernel
from tinyserve.tensor.quant import store_activations
from tinyserve.tensor.simd import load, round_to_int, splat, store
from tinyserve.tensor.tiles import begin_part, dot_rows, end_part, inputs_per_load, scaled_rows, start_rows, zeros


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


if __name__ == "__main__":
    check()
