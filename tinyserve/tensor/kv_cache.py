"""Writing keys and values into the pages of the cache, rotated on the way, in the precision that the cache is kept in.

float32; bfloat16 kept as uint16; or int8 with a scale for each token and head. attention.py reads them.
"""

import numpy as np
from numba import prange

from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.rope import rotate_row
from tinyserve.tensor.simd import as_kept

LARGEST = np.float32(127.0)


@kernel
def _scale(qkv, m, first, head_dim):
    """The scale of a head's int8 numbers; nan where one of them is."""
    largest = np.float32(0.0)
    for d in range(first, first + head_dim):
        v = abs(qkv[m, d])
        largest = v if v > largest or v != v else largest
        if v != v:
            break
    return largest / LARGEST


@kernel
def _store_token(qkv, heads, kv_heads, head_dim, slot, keys, values, key_scales, value_scales, m):
    block_size = keys.shape[3]
    block, offset = slot // block_size, slot % block_size
    for head in range(kv_heads):
        k, v = (heads + head) * head_dim, (heads + kv_heads + head) * head_dim
        k_inverse = v_inverse = np.float32(1.0)
        if key_scales.size:
            k_scale, v_scale = _scale(qkv, m, k, head_dim), _scale(qkv, m, v, head_dim)
            key_scales[block, head, offset], value_scales[block, head, offset] = k_scale, v_scale
            k_inverse = np.float32(1.0) / k_scale if k_scale > 0 else np.float32(0.0)
            v_inverse = np.float32(1.0) / v_scale if v_scale > 0 else np.float32(0.0)
        for d in range(head_dim):
            keys[block, head, d, offset] = as_kept(keys, qkv[m, k + d], k_inverse)
            values[block, head, offset, d] = as_kept(values, qkv[m, v + d], v_inverse)


@kernel
def _rotate_and_store(
    qkv, cosines, sines, position, heads, kv_heads, head_dim, slot, keys, values, key_scales, value_scales, m
):
    if cosines.size:
        rotate_row(qkv, cosines, sines, position, heads + kv_heads, head_dim, m)
    _store_token(qkv, heads, kv_heads, head_dim, slot, keys, values, key_scales, value_scales, m)


@parallel_kernel
def rotate_and_store(
    qkv, cosines, sines, positions, heads, kv_heads, head_dim, slots, keys, values, key_scales, value_scales
):
    """Rotate each token's queries and keys in place (tables may be empty), and write its keys and values to the cache.

    qkv (tokens, (heads + 2·kv_heads)·head_dim): queries, keys, values; slots (tokens,): block · block_size + offset;
    keys (blocks, kv_heads, head_dim, block_size), values (blocks, kv_heads, block_size, padded head_dim), of float32,
    bfloat16 or int8; scales (blocks, kv_heads, block_size) float32 for int8, else empty.
    """
    if qkv.shape[0] == 1:
        _rotate_and_store(
            qkv, cosines, sines, positions[0], heads, kv_heads, head_dim, slots[0], keys, values, key_scales,
            value_scales, np.int64(0),
        )  # fmt: skip
    else:
        for m in prange(qkv.shape[0]):
            _rotate_and_store(
                qkv, cosines, sines, positions[m], heads, kv_heads, head_dim, slots[m], keys, values, key_scales,
                value_scales, np.int64(m),
            )  # fmt: skip
