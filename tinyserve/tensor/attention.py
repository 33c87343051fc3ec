"""Causal attention over a paged cache, one pass over the keys with a running softmax.

FlashAttention's recurrence: Dao et al. 2022, arXiv:2205.14135; pages: Kwon et al. 2023, arXiv:2309.06180. A page holds
keys transposed, (kv_heads, head_dim, block_size), so that one vector is 16 keys and a score needs no sum over lanes,
and values as (kv_heads, block_size, head_dim padded to 16), so that one vector is 16 numbers of the output.

Every query walks its keys in chunks of 64 that start at multiples of 64, whoever else is in the batch.
"""

import numpy as np
from numba import prange

from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.simd import (
    LANES,
    exp,
    first_lanes,
    fma,
    load,
    max_lane,
    maximum,
    splat,
    store,
    store_first,
    sum_lanes,
)  # fmt: skip

CHUNK = 4 * LANES  # keys that one step of the running softmax takes in


@kernel
def _store_token(qkv, heads, kv_heads, head_dim, slot, keys, values, m):
    block_size = keys.shape[3]
    block, offset = slot // block_size, slot % block_size
    for head in range(kv_heads):
        k, v = (heads + head) * head_dim, (heads + kv_heads + head) * head_dim
        for d in range(head_dim):
            keys[block, head, d, offset] = qkv[m, k + d]
            values[block, head, offset, d] = qkv[m, v + d]


@parallel_kernel
def store_kv(qkv, heads, kv_heads, head_dim, slots, keys, values):
    """Write each token's keys and values into its cache slot.

    qkv (tokens, (heads + 2·kv_heads)·head_dim): queries, keys, values; slots (tokens,): block · block_size + offset;
    keys (blocks, kv_heads, head_dim, block_size), values (blocks, kv_heads, block_size, padded head_dim), float32.
    """
    if qkv.shape[0] == 1:
        _store_token(qkv, heads, kv_heads, head_dim, slots[0], keys, values, 0)
    else:
        for m in prange(qkv.shape[0]):
            _store_token(qkv, heads, kv_heads, head_dim, slots[m], keys, values, m)


@kernel
def _attend(qkv, q_at, head_dim, kv_head, keys, values, blocks, position, first, scale, weights, total, out, out_at):
    """One query head of one token: keys first..position of the sequence whose pages are `blocks`."""
    kv_heads, block_size, width = values.shape[1], values.shape[2], values.shape[3]
    minus_infinity, scales = splat(np.float32(-np.inf)), splat(scale)
    largest, denominator = np.float32(-np.inf), np.float32(0.0)
    total[:] = np.float32(0.0)
    for start in range(first // CHUNK * CHUNK, position + 1, CHUNK):
        count = min(CHUNK, position + 1 - start)
        # Vectors past the last key read the chunk's first page again, and are masked.
        k0 = _key_address(blocks, start, start, position, kv_heads, kv_head, head_dim, block_size)
        k1 = _key_address(blocks, start + LANES, start, position, kv_heads, kv_head, head_dim, block_size)
        k2 = _key_address(blocks, start + 2 * LANES, start, position, kv_heads, kv_head, head_dim, block_size)
        k3 = _key_address(blocks, start + 3 * LANES, start, position, kv_heads, kv_head, head_dim, block_size)
        s0 = s1 = s2 = s3 = splat(np.float32(0.0))
        for d in range(head_dim):
            q = splat(qkv[q_at + d])
            s0 = fma(load(keys, k0 + d * block_size), q, s0)
            s1 = fma(load(keys, k1 + d * block_size), q, s1)
            s2 = fma(load(keys, k2 + d * block_size), q, s2)
            s3 = fma(load(keys, k3 + d * block_size), q, s3)
        s0 = first_lanes(s0 * scales, minus_infinity, count)
        s1 = first_lanes(s1 * scales, minus_infinity, count - LANES)
        s2 = first_lanes(s2 * scales, minus_infinity, count - 2 * LANES)
        s3 = first_lanes(s3 * scales, minus_infinity, count - 3 * LANES)
        if start < first:
            s0 = first_lanes(minus_infinity, s0, first - start)
            s1 = first_lanes(minus_infinity, s1, first - start - LANES)
            s2 = first_lanes(minus_infinity, s2, first - start - 2 * LANES)
            s3 = first_lanes(minus_infinity, s3, first - start - 3 * LANES)
        before = largest
        largest = max(largest, max_lane(maximum(maximum(s0, s1), maximum(s2, s3))))
        shift = splat(largest)
        p0, p1, p2, p3 = exp(s0 - shift), exp(s1 - shift), exp(s2 - shift), exp(s3 - shift)
        shrink = np.exp(before - largest)
        denominator = denominator * shrink + sum_lanes((p0 + p1) + (p2 + p3))
        store(weights, 0, p0)
        store(weights, LANES, p1)
        store(weights, 2 * LANES, p2)
        store(weights, 3 * LANES, p3)
        _add_values(values, weights, total, blocks, start, max(first, start), start + count, kv_head, shrink)
    inverse = splat(np.float32(1.0) / denominator)
    for d in range(0, width, LANES):
        store_first(out, out_at + d, load(total, d) * inverse, head_dim - d)


@kernel
def _key_address(blocks, key, start, position, kv_heads, kv_head, head_dim, block_size):
    """The flat index of key `key`'s first number; of the chunk's first key where `key` is past the position."""
    if key > position:
        key = start
    page = np.int64(blocks[key // block_size]) * kv_heads + kv_head
    return page * head_dim * block_size + key % block_size


@kernel
def _add_values(values, weights, total, blocks, start, first, last, kv_head, shrink):
    """total = total · shrink + sum over the chunk's keys first..last-1 of weight · value."""
    kv_heads, block_size, width = values.shape[1], values.shape[2], values.shape[3]
    shrinks = splat(shrink)
    for d in range(0, width // CHUNK * CHUNK, CHUNK):
        o0, o1 = load(total, d) * shrinks, load(total, d + LANES) * shrinks
        o2, o3 = load(total, d + 2 * LANES) * shrinks, load(total, d + 3 * LANES) * shrinks
        for key in range(first, last):
            page = np.int64(blocks[key // block_size]) * kv_heads + kv_head
            at = (page * block_size + key % block_size) * width + d
            p = splat(weights[key - start])
            o0 = fma(load(values, at), p, o0)
            o1 = fma(load(values, at + LANES), p, o1)
            o2 = fma(load(values, at + 2 * LANES), p, o2)
            o3 = fma(load(values, at + 3 * LANES), p, o3)
        store(total, d, o0)
        store(total, d + LANES, o1)
        store(total, d + 2 * LANES, o2)
        store(total, d + 3 * LANES, o3)
    for d in range(width // CHUNK * CHUNK, width, LANES):
        o = load(total, d) * shrinks
        for key in range(first, last):
            page = np.int64(blocks[key // block_size]) * kv_heads + kv_head
            at = (page * block_size + key % block_size) * width + d
            o = fma(load(values, at), splat(weights[key - start]), o)
        store(total, d, o)


@parallel_kernel
def attention(qkv, heads, keys, values, block_tables, sequence_of, positions, scale, window):
    """softmax(q · kᵀ · scale) · v of every token over its own sequence, up to and including itself.

    qkv (tokens, (heads + 2·kv_heads)·head_dim), keys and values as `store_kv` wrote them, block_tables (sequences,
    most blocks) int32, sequence_of and positions (tokens,) int64; window: how many keys back a query sees, 0 for all.
    Query head h reads kv head h · kv_heads // heads, which makes MHA, GQA and MQA one rule. -> (tokens, heads·head_dim)
    """
    tokens, head_dim, kv_heads = qkv.shape[0], keys.shape[2], keys.shape[1]
    out = np.empty((tokens, heads * head_dim), np.float32)
    flat = qkv.ravel()
    for item in prange(tokens * heads):
        head, m = item // tokens, item % tokens
        weights = np.empty(CHUNK, np.float32)
        total = np.empty(values.shape[3], np.float32)
        position = positions[m]
        first = max(0, position - window + 1) if window > 0 else 0
        _attend(
            flat, m * qkv.shape[1] + head * head_dim, head_dim, head * kv_heads // heads, keys, values,
            block_tables[sequence_of[m]], position, first, scale, weights, total,
            out, (m * heads + head) * head_dim,
        )  # fmt: skip
    return out
