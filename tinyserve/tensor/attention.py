"""Causal attention over a paged cache, one pass over the keys with a running softmax.

FlashAttention's recurrence: Dao et al. 2022, arXiv:2205.14135; pages: Kwon et al. 2023, arXiv:2309.06180. A page holds
keys transposed, (kv_heads, head_dim, block_size), so that one vector is 16 keys and a score needs no sum over lanes,
and values as (kv_heads, block_size, head_dim padded to 16), so that one vector is 16 numbers of the output.

Every query walks its keys in chunks of 64 that start at multiples of 64, whoever else is in the batch. Queries that see
the same keys go together in a register tile, to load each key once: neighbouring tokens of a prompt, or, when decoding,
the query heads that share a key head. A query for which a chunk is wholly masked is left as it was, to the bit,
unless the chunk holds values that are not finite.
"""

import numpy as np
from numba import prange

from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.simd import LANES, exp, first_lanes, load, max_lane, maximum, splat, store, store_first, sum_lanes
from tinyserve.tensor.tiles import fma_rows, load_panels, load_rows, load_tile, store_rows, zeros

PANELS = 4
CHUNK = PANELS * LANES  # keys that one step of the running softmax takes in
MOST_ROWS = 4  # queries that share the keys they load: six spill registers
ITEM = 4 * MOST_ROWS  # tokens of a work item


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


def _query_tile(ROWS):
    """A kernel for ROWS queries: each stands `step` positions and `q_stride` numbers after the one before."""
    SIZE = ROWS * PANELS

    @kernel
    def tile(
        q, q_at, q_stride, out, out_at, out_stride, keys, values, blocks, kv_head, position, step, window, scale,
        scratch,
    ):  # fmt: skip
        kv_heads, head_dim, block_size, width = keys.shape[1], keys.shape[2], keys.shape[3], values.shape[3]
        # In the scratch: each row's weights of a chunk, then its output so far, then its largest score and its sum.
        total_at = MOST_ROWS * CHUNK
        largest_at = total_at + MOST_ROWS * width
        for r in range(ROWS):
            scratch[largest_at + 2 * r] = -np.inf
            scratch[largest_at + 2 * r + 1] = 0.0
            for d in range(0, width, LANES):
                store(scratch, total_at + r * width + d, splat(np.float32(0.0)))
        last = position + (ROWS - 1) * step
        for start in range(_first_key(position, window) // CHUNK * CHUNK, last + 1, CHUNK):
            # Vectors past the last key read the chunk's first page again, and are masked.
            k0 = _key_address(blocks, start, start, last, kv_heads, kv_head, head_dim, block_size)
            k1 = _key_address(blocks, start + LANES, start, last, kv_heads, kv_head, head_dim, block_size)
            k2 = _key_address(blocks, start + 2 * LANES, start, last, kv_heads, kv_head, head_dim, block_size)
            k3 = _key_address(blocks, start + 3 * LANES, start, last, kv_heads, kv_head, head_dim, block_size)
            scores = zeros(SIZE)
            for d in range(head_dim):
                at = d * block_size
                scores = fma_rows(scores, load_panels(keys, k0 + at, k1 + at, k2 + at, k3 + at), q, q_at + d, q_stride)
            store_rows(scratch, 0, CHUNK, scores, PANELS, CHUNK)
            for r in range(ROWS):
                row_position = position + r * step
                _softmax_step(
                    scratch, r * CHUNK, total_at + r * width, width, largest_at + 2 * r, scale,
                    _first_key(row_position, window) - start, row_position + 1 - start,
                )  # fmt: skip
            stop = min(start + CHUNK, last + 1)
            for d in range(0, width // CHUNK * CHUNK, CHUNK):
                total = load_rows(ROWS, PANELS, scratch, total_at + d, width)
                for key in range(start, stop):
                    at = _value_address(blocks, key, kv_heads, kv_head, block_size, width) + d
                    total = fma_rows(total, load_tile(PANELS, values, at, LANES), scratch, key - start, CHUNK)
                store_rows(scratch, total_at + d, width, total, PANELS, CHUNK)
            for d in range(width // CHUNK * CHUNK, width, LANES):
                narrow = load_rows(ROWS, 1, scratch, total_at + d, width)
                for key in range(start, stop):
                    at = _value_address(blocks, key, kv_heads, kv_head, block_size, width) + d
                    narrow = fma_rows(narrow, load_tile(1, values, at, LANES), scratch, key - start, CHUNK)
                store_rows(scratch, total_at + d, width, narrow, 1, LANES)
        for r in range(ROWS):
            inverse = splat(np.float32(1.0) / scratch[largest_at + 2 * r + 1])
            for d in range(0, head_dim, LANES):
                answer = load(scratch, total_at + r * width + d) * inverse
                store_first(out, out_at + r * out_stride + d, answer, head_dim - d)

    return tile


_query_tile_1, _query_tile_3, _query_tile_4 = _query_tile(1), _query_tile(3), _query_tile(MOST_ROWS)


@kernel
def _first_key(position, window):
    """The first position that a query at `position` sees."""
    return max(0, position - window + 1) if window > 0 else 0


@kernel
def _key_address(blocks, key, start, last, kv_heads, kv_head, head_dim, block_size):
    """The flat index of key `key`'s first number; of the chunk's first key where `key` is past the last."""
    if key > last:
        key = start
    page = np.int64(blocks[key // block_size]) * kv_heads + kv_head
    return page * head_dim * block_size + key % block_size


@kernel
def _value_address(blocks, key, kv_heads, kv_head, block_size, width):
    """The flat index of the first number of key `key`'s value."""
    page = np.int64(blocks[key // block_size]) * kv_heads + kv_head
    return (page * block_size + key % block_size) * width


@kernel
def _softmax_step(scratch, scores_at, total_at, width, largest_at, scale, first, count):
    """Turn a row's scores of a chunk into weights, zero outside lanes first..count-1, and shrink its past to match."""
    scales, minus_infinity = splat(scale), splat(np.float32(-np.inf))
    s0 = first_lanes(load(scratch, scores_at) * scales, minus_infinity, count)
    s1 = first_lanes(load(scratch, scores_at + LANES) * scales, minus_infinity, count - LANES)
    s2 = first_lanes(load(scratch, scores_at + 2 * LANES) * scales, minus_infinity, count - 2 * LANES)
    s3 = first_lanes(load(scratch, scores_at + 3 * LANES) * scales, minus_infinity, count - 3 * LANES)
    if first > 0:
        s0 = first_lanes(minus_infinity, s0, first)
        s1 = first_lanes(minus_infinity, s1, first - LANES)
        s2 = first_lanes(minus_infinity, s2, first - 2 * LANES)
        s3 = first_lanes(minus_infinity, s3, first - 3 * LANES)
    before = scratch[largest_at]
    largest = max(before, max_lane(maximum(maximum(s0, s1), maximum(s2, s3))))
    # Nothing seen yet and nothing here: any finite shift gives weights of zero, where -inf would give nan.
    finite = largest if largest > -np.inf else np.float32(0.0)
    shift = splat(finite)
    p0, p1, p2, p3 = exp(s0 - shift), exp(s1 - shift), exp(s2 - shift), exp(s3 - shift)
    store(scratch, scores_at, p0)
    store(scratch, scores_at + LANES, p1)
    store(scratch, scores_at + 2 * LANES, p2)
    store(scratch, scores_at + 3 * LANES, p3)
    if largest > before:
        shrink = np.exp(before - finite)
        for d in range(0, width, LANES):
            store(scratch, total_at + d, load(scratch, total_at + d) * splat(shrink))
        scratch[largest_at] = largest
        scratch[largest_at + 1] *= shrink
    scratch[largest_at + 1] += sum_lanes((p0 + p1) + (p2 + p3))


@parallel_kernel
def attention(qkv, heads, keys, values, block_tables, sequence_of, positions, scale, window):
    """softmax(q · kᵀ · scale) · v of every token over its own sequence, up to and including itself.

    qkv (tokens, (heads + 2·kv_heads)·head_dim), keys and values as `store_kv` wrote them, block_tables (sequences,
    most blocks) int32, sequence_of and positions (tokens,) int64, tokens of a sequence side by side and in order;
    window: how many keys back a query sees, 0 for all. Query head h reads key head h // (heads // kv_heads), which
    makes MHA, GQA and MQA one rule; kv_heads divides heads. -> (tokens, heads·head_dim)
    """
    tokens, head_dim, kv_heads = qkv.shape[0], keys.shape[2], keys.shape[1]
    group, q_width, out_width = heads // kv_heads, qkv.shape[1], heads * head_dim
    out, q = np.empty((tokens, out_width), np.float32), qkv.ravel()
    items = (tokens + ITEM - 1) // ITEM
    for item in prange(kv_heads * items):
        scratch = np.empty(MOST_ROWS * (CHUNK + values.shape[3] + 2), np.float32)
        kv_head, i = item // items, item % items
        # Later items see more keys: early and late ones alternate, so that every thread's share is fair.
        m = (i // 2 if i % 2 == 0 else items - 1 - i // 2) * ITEM
        end = min(tokens, m + ITEM)
        while m < end:
            blocks, position = block_tables[sequence_of[m]], positions[m]
            run = 1
            while m + run < end and sequence_of[m + run] == sequence_of[m]:
                run += 1
            if run == 1:  # one token: its heads are the rows
                rows, others, step, row_width, other_width = group, 1, 0, head_dim, 0
            else:  # several tokens of a prompt: they are the rows, head by head
                rows, others, step, row_width, other_width = run, group, 1, 0, head_dim
            q_stride = row_width if row_width else q_width
            out_stride = row_width if row_width else out_width
            for other in range(others):
                column = kv_head * group * head_dim + other * other_width
                q_at, out_at, r = m * q_width + column, m * out_width + column, 0
                while r < rows:
                    q_row, out_row, row_position = q_at + r * q_stride, out_at + r * out_stride, position + r * step
                    if r + MOST_ROWS <= rows:
                        _query_tile_4(
                            q, q_row, q_stride, out, out_row, out_stride, keys, values, blocks, kv_head, row_position,
                            step, window, scale, scratch,
                        )  # fmt: skip
                        r += MOST_ROWS
                    elif r + 3 <= rows:
                        _query_tile_3(
                            q, q_row, q_stride, out, out_row, out_stride, keys, values, blocks, kv_head, row_position,
                            step, window, scale, scratch,
                        )  # fmt: skip
                        r += 3
                    else:
                        _query_tile_1(
                            q, q_row, q_stride, out, out_row, out_stride, keys, values, blocks, kv_head, row_position,
                            step, window, scale, scratch,
                        )  # fmt: skip
                        r += 1
            m += run
    return out
