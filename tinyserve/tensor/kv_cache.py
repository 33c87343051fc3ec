"""The pages of the KV cache, and writing keys and values into them, keys rotated on the way.

Paging: Kwon et al. 2023, arXiv:2309.06180. attention.py reads what is written here.
"""

from typing import NamedTuple

import numpy as np

from tinyserve.tensor._jit import kernel
from tinyserve.tensor.bfloat16 import copy_half, copy_word, keep, numbers_per_word, store_numbers
from tinyserve.tensor.native import stack_array
from tinyserve.tensor.program import constant, instruction
from tinyserve.tensor.rope import rotate_heads
from tinyserve.tensor.simd import LANES, load_first
from tinyserve.tensor.thread_pool import own_items

Array = np.ndarray

LARGEST = np.float32(127.0)


@constant
class Pages(NamedTuple):
    """The keys and values of one attention layer, in blocks of `block_size` tokens.

    They are float32, bfloat16, or int8 with a scale for each token and head. In a block, for each head,

        keys      t0 t1 t2 ..     values    d0 d1 d2 .. 0
              d0   ·  ·  ·              t0   ·  ·  ·    ·
              d1   ·  ·  ·              t1   ·  ·  ·    ·
              ..                        ..

    keys are transposed, so that one vector is 16 keys and a score needs no sum over lanes; a value is padded to whole
    vectors, so that one vector is 16 numbers of the output. bfloat16 lies in pairs, as words of uint32: two rows of
    this picture are one, d0 with d1 and t0 with t1. `block_size` is a multiple of 16.
    """

    keys: Array  # (blocks, kv_heads, head_dim, block_size), or half as many rows, rounded up
    values: Array  # (blocks, kv_heads, block_size, padded head_dim), or half as many rows
    key_scales: Array  # (blocks, kv_heads, block_size) float32 for int8, else (0, 0, 0)
    value_scales: Array


class Tokens(NamedTuple):
    """The new tokens of a batch, those of a sequence side by side and in order."""

    positions: Array  # (tokens,) int64: place in its own sequence
    slot_mapping: Array  # (tokens,) int64: where its key and value go, block · block_size + offset
    sequence_of: Array  # (tokens,) int64: row of block_tables
    block_tables: Array  # (sequences, most blocks) int32


@constant
class Heads(NamedTuple):
    """A row of qkv: `heads` queries, `kv_heads` keys and as many values, each of `head_dim` numbers.

    Query head h reads key head h // (heads // kv_heads), which makes multi-head, grouped-query and multi-query
    attention one rule; kv_heads divides heads.
    """

    heads: int
    kv_heads: int
    head_dim: int


@instruction
def rotate_and_store(team, qkv, heads, rope_table, tokens, pages):
    """Rotate each token's queries and keys in place, and write its keys and values to the cache.

    qkv (tokens, (heads + 2·kv_heads)·head_dim) float32; an empty `rope_table` rotates nothing.
    """
    first, last = own_items(team, qkv.shape[0] * heads.kv_heads)
    for item in range(first, last):
        m, kv_head = item // heads.kv_heads, item % heads.kv_heads
        row, head_dim, group = m * qkv.shape[1], heads.head_dim, heads.heads // heads.kv_heads
        key = (heads.heads + kv_head) * head_dim
        if rope_table.cosines.size:
            position = tokens.positions[m]
            rotate_heads(qkv, rope_table, position, row + kv_head * group * head_dim, group, head_dim)
            rotate_heads(qkv, rope_table, position, row + key, 1, head_dim)
        _store(qkv[m], key, key + heads.kv_heads * head_dim, head_dim, tokens.slot_mapping[m], kv_head, pages)


@kernel
def _store(row, key, value, head_dim, slot, kv_head, pages):
    """Write the key and the value that begin at these indices of a row of qkv."""
    block_size, width = pages.keys.shape[3], pages.values.shape[3]
    block, offset = slot // block_size, slot % block_size
    k_inverse = v_inverse = np.float32(1.0)
    if pages.key_scales.size:
        k_scale, v_scale = _scale(row, key, head_dim), _scale(row, value, head_dim)
        pages.key_scales[block, kv_head, offset], pages.value_scales[block, kv_head, offset] = k_scale, v_scale
        k_inverse = np.float32(1.0) / k_scale if k_scale > 0 else np.float32(0.0)
        v_inverse = np.float32(1.0) / v_scale if v_scale > 0 else np.float32(0.0)
    head, numbers = block * pages.keys.shape[1] + kv_head, numbers_per_word(pages.keys)
    key_at = head * pages.keys.shape[2] * block_size + offset
    value_at, half = (head * pages.values.shape[2] + offset // numbers) * width, offset % numbers
    if numbers == 2:
        _store_pairs(row, key, value, head_dim, key_at, value_at, half, pages)
        return
    for d in range(head_dim):
        keep(pages.keys, key_at + d * block_size, 0, row[key + d], k_inverse)
    for d in range(head_dim):
        keep(pages.values, value_at + d, 0, row[value + d], v_inverse)


@kernel
def _store_pairs(row, key, value, head_dim, key_at, value_at, half, pages):
    """The same in bfloat16: 32 numbers are rounded at a time."""
    block_size, pairs = pages.keys.shape[3], stack_array(LANES, np.uint32)
    for d in range(0, head_dim, 2 * LANES):
        left = head_dim - d
        store_numbers(pairs, 0, load_first(row, key + d, left), load_first(row, key + d + LANES, left - LANES))
        for i in range(min(LANES, (left + 1) // 2)):
            copy_word(pages.keys, key_at + (d // 2 + i) * block_size, pairs, i)
        store_numbers(pairs, 0, load_first(row, value + d, left), load_first(row, value + d + LANES, left - LANES))
        for i in range(min(2 * LANES, left)):
            copy_half(pages.values, 2 * (value_at + d + i) + half, pairs, i)


@kernel
def _scale(x, first, head_dim):
    """The scale of a head's int8 numbers; nan where one of them is."""
    largest = np.float32(0.0)
    for d in range(first, first + head_dim):
        v = abs(x[d])
        largest = v if v > largest or v != v else largest
        if v != v:
            break
    return largest / LARGEST
