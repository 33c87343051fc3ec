"""Paged attention: causal attention over a paged KV cache, one pass over the keys with a running softmax.

FlashAttention's recurrence: Dao et al. 2022, arXiv:2205.14135; pages: Kwon et al. 2023, arXiv:2309.06180; keys split
among threads when decoding: Dao et al. 2023, "Flash-Decoding". A page holds keys transposed, (kv_heads, head_dim,
block_size), so that one vector is 16 keys and a score needs no sum over lanes, and values as (kv_heads, block_size,
head_dim padded to 16), so that one vector is 16 numbers of the output.

Every query walks its keys in chunks of 64 and spans of 512, both from multiples of their size, whoever else is in the
batch; what the spans come to is merged in their order. Queries that see the same keys go together in a register tile,
to load each key once: neighbouring tokens of a prompt, or, when decoding, the query heads that share a key head. A
query for which a chunk is wholly masked is left as it was, to the bit, unless the chunk holds values not finite.
"""

import numpy as np
from numba import prange

from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.simd import (
    LANES,
    WIDE,
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
)
from tinyserve.tensor.tiles import fma_rows, load_panels, load_rows, load_tile, store_rows, zeros

CHUNK = 4 * LANES  # keys that one step of the running softmax takes in
SPAN = 8 * CHUNK  # keys that one work item goes through
# Queries that share the keys they load, and vectors of keys: as many sums as fit the registers, and no more.
MOST_ROWS, PANELS = (4, 4) if WIDE else (3, 2)
ITEM = 48  # tokens of a work item, at most
UNPACK = 8  # neighbouring tokens for which a span is made float32 first, and its pages one


def _query_tile(ROWS):
    """A kernel for ROWS queries and one span of keys: each query stands `step` positions after the one before.

    Positions and keys are counted from position `before`. Into `part`, a row each `part_stride`: the weighted values
    (padded head_dim), the largest score, the sum of weights.
    """
    SIZE = ROWS * PANELS

    @kernel
    def tile(
        q, q_at, q_stride, keys, values, key_scales, value_scales, blocks, kv_head, position, step, window, scale,
        alibi, head, head_step, span, before, part, part_at, part_stride, weights,
    ):  # fmt: skip
        kv_heads, head_dim, block_size, width = keys.shape[1], keys.shape[2], keys.shape[3], values.shape[3]
        for r in range(ROWS):
            at = part_at + r * part_stride
            for d in range(0, width, LANES):
                store(part, at + d, splat(np.float32(0.0)))
            part[at + width] = -np.inf
            part[at + width + 1] = 0.0
        last = min(position + (ROWS - 1) * step, span + SPAN - 1)
        for start in range(max(span, _first_key(position, window) // CHUNK * CHUNK), last + 1, CHUNK):
            for p in range(0, CHUNK // LANES, PANELS):
                key = start + p * LANES
                # Vectors past the last key read the chunk's first page again, and are masked.
                k0 = _key_address(blocks, key, start, last, kv_heads, kv_head, head_dim, block_size)
                k1 = _key_address(blocks, key + LANES, start, last, kv_heads, kv_head, head_dim, block_size)
                k2 = k3 = k0
                if PANELS == 4:
                    k2 = _key_address(blocks, key + 2 * LANES, start, last, kv_heads, kv_head, head_dim, block_size)
                    k3 = _key_address(blocks, key + 3 * LANES, start, last, kv_heads, kv_head, head_dim, block_size)
                scores = zeros(SIZE)
                for d in range(head_dim):
                    at = d * block_size
                    panels = load_panels(PANELS, keys, k0 + at, k1 + at, k2 + at, k3 + at)
                    scores = fma_rows(scores, panels, q, q_at + d, q_stride)
                store_rows(weights, p * LANES, CHUNK, scores, PANELS, CHUNK)
            for r in range(ROWS):
                row_position = position + r * step
                _adjust_scores(
                    weights, r * CHUNK, start, last, scale, alibi, (head + r * head_step) * alibi.shape[1] + before,
                    key_scales, blocks, kv_head, kv_heads, block_size,
                )  # fmt: skip
                first, count = _first_key(row_position, window) - start, row_position + 1 - start
                _softmax_step(weights, r * CHUNK, part, part_at + r * part_stride, width, first, count)
                if value_scales.size:
                    for key in range(start, min(start + CHUNK, last + 1)):
                        page = np.int64(blocks[key // block_size]) * kv_heads + kv_head
                        weights[r * CHUNK + key - start] *= value_scales.ravel()[page * block_size + key % block_size]
            stop = min(start + CHUNK, last + 1)
            many = PANELS * LANES
            for d in range(0, width // many * many, many):
                total = load_rows(ROWS, PANELS, part, part_at + d, part_stride)
                for first in range(start, stop, LANES):  # neighbours of a page
                    at = _value_address(blocks, first, kv_heads, kv_head, block_size, width) + d
                    for key in range(first, min(first + LANES, stop)):
                        total = fma_rows(total, load_tile(PANELS, values, at, LANES), weights, key - start, CHUNK)
                        at += width
                store_rows(part, part_at + d, part_stride, total, PANELS, many)
            for d in range(width // many * many, width, LANES):
                narrow = load_rows(ROWS, 1, part, part_at + d, part_stride)
                for first in range(start, stop, LANES):
                    at = _value_address(blocks, first, kv_heads, kv_head, block_size, width) + d
                    for key in range(first, min(first + LANES, stop)):
                        narrow = fma_rows(narrow, load_tile(1, values, at, LANES), weights, key - start, CHUNK)
                        at += width
                store_rows(part, part_at + d, part_stride, narrow, 1, LANES)

    return tile


_query_tile_1, _query_tile_most = _query_tile(1), _query_tile(MOST_ROWS)


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
def _adjust_scores(weights, at, start, last, scale, alibi, alibi_at, key_scales, blocks, kv_head, kv_heads, block_size):
    """(q · k + alibi) · scale of a row's chunk, in place; `alibi_at` is where the head's bias of key 0 is."""
    for i in range(0, CHUNK, LANES):
        s = load(weights, at + i)
        if key_scales.size:
            s = s * load(key_scales, _key_address(blocks, start + i, start, last, kv_heads, kv_head, 1, block_size))
        if alibi.size:
            s = s + load(alibi, alibi_at + start + i)
        store(weights, at + i, s * splat(scale))


@kernel
def _softmax_step(weights, at, part, part_at, width, first, count):
    """Turn a row's scores of a chunk into weights, zero outside lanes first..count-1, and shrink its past to match."""
    minus_infinity = splat(np.float32(-np.inf))
    s0 = first_lanes(load(weights, at), minus_infinity, count)
    s1 = first_lanes(load(weights, at + LANES), minus_infinity, count - LANES)
    s2 = first_lanes(load(weights, at + 2 * LANES), minus_infinity, count - 2 * LANES)
    s3 = first_lanes(load(weights, at + 3 * LANES), minus_infinity, count - 3 * LANES)
    if first > 0:
        s0 = first_lanes(minus_infinity, s0, first)
        s1 = first_lanes(minus_infinity, s1, first - LANES)
        s2 = first_lanes(minus_infinity, s2, first - 2 * LANES)
        s3 = first_lanes(minus_infinity, s3, first - 3 * LANES)
    largest_at = part_at + width
    before = part[largest_at]
    largest = max(before, max_lane(maximum(maximum(s0, s1), maximum(s2, s3))))
    # Nothing seen yet and nothing here: any finite shift gives weights of zero, where -inf would give nan.
    finite = largest if largest > -np.inf else np.float32(0.0)
    shift = splat(finite)
    p0, p1, p2, p3 = exp(s0 - shift), exp(s1 - shift), exp(s2 - shift), exp(s3 - shift)
    store(weights, at, p0)
    store(weights, at + LANES, p1)
    store(weights, at + 2 * LANES, p2)
    store(weights, at + 3 * LANES, p3)
    if largest > before:
        shrink = np.exp(before - finite)
        for d in range(0, width, LANES):
            store(part, part_at + d, load(part, part_at + d) * splat(shrink))
        part[largest_at] = largest
        part[largest_at + 1] *= shrink
    part[largest_at + 1] += sum_lanes((p0 + p1) + (p2 + p3))


@kernel
def _merge(total, total_at, part, part_at, width):
    """Take a span's part into the total of the spans before it; a part that saw no key changes nothing."""
    ours, theirs = total[total_at + width], part[part_at + width]
    if not theirs > -np.inf and part[part_at + width + 1] == 0:
        return
    largest = max(ours, theirs)
    a, b = np.exp(ours - largest), np.exp(theirs - largest)
    for d in range(0, width, LANES):
        v = fma(load(part, part_at + d), splat(b), load(total, total_at + d) * splat(a))
        store(total, total_at + d, v)
    total[total_at + width] = largest
    total[total_at + width + 1] = total[total_at + width + 1] * a + part[part_at + width + 1] * b


@kernel
def _answer(total, total_at, width, out, out_at, head_dim):
    """The weighted mean of the values."""
    inverse = splat(np.float32(1.0) / total[total_at + width + 1])
    for d in range(0, head_dim, LANES):
        store_first(out, out_at + d, load(total, total_at + d) * inverse, head_dim - d)


@kernel
def _rows_of_tiles(
    rows, q, q_at, q_stride, keys, values, key_scales, value_scales, blocks, kv_head, position, step, window, scale,
    alibi, head, span, before, parts, part_at, part_stride, weights,
):  # fmt: skip
    """`rows` queries and one span: neighbouring tokens of one head (step 1), or neighbouring heads of one token."""
    r = 0
    while r < rows:
        if rows >= MOST_ROWS:
            r = min(r, rows - MOST_ROWS)  # the last tile does some rows again: they come to the same
            _query_tile_most(
                q, q_at + r * q_stride, q_stride, keys, values, key_scales, value_scales, blocks, kv_head,
                position + r * step, step, window, scale, alibi, head + r * (1 - step), 1 - step, span, before, parts,
                part_at + r * part_stride, part_stride, weights,
            )  # fmt: skip
            r += MOST_ROWS
        else:
            _query_tile_1(
                q, q_at + r * q_stride, q_stride, keys, values, key_scales, value_scales, blocks, kv_head,
                position + r * step, step, window, scale, alibi, head + r * (1 - step), 1 - step, span, before, parts,
                part_at + r * part_stride, part_stride, weights,
            )  # fmt: skip
            r += 1


@kernel
def _unpack(keys, values, key_scales, value_scales, blocks, kv_head, first, count, flat):
    """`count` keys from `first` on as float32 in one page each of keys and values; scales as they are."""
    flat_keys, flat_values, flat_key_scales, flat_value_scales = flat
    kv_heads, head_dim, block_size, width = keys.shape[1], keys.shape[2], keys.shape[3], values.shape[3]
    last = first + count - 1
    for key in range(0, count, LANES):
        at = _key_address(blocks, first + key, first, last, kv_heads, kv_head, head_dim, block_size)
        for d in range(head_dim):
            store(flat_keys, d * SPAN + key, load(keys, at + d * block_size))
        if key_scales.size:
            at = _key_address(blocks, first + key, first, last, kv_heads, kv_head, 1, block_size)
            store(flat_key_scales, key, load(key_scales, at))
            store(flat_value_scales, key, load(value_scales, at))
    for key in range(count):
        at = _value_address(blocks, first + key, kv_heads, kv_head, block_size, width)
        for d in range(0, width, LANES):
            store(flat_values, key * width + d, load(values, at + d))


@kernel
def _span_of_tokens(
    item, per_item, spans, items, q, q_width, heads, keys, values, key_scales, value_scales, block_tables, sequence_of,
    positions, scale, window, alibi, parts,
):  # fmt: skip
    """Some neighbouring tokens, one key head and one span of keys."""
    kv_heads, head_dim, width = keys.shape[1], keys.shape[2], values.shape[3]
    span, i, kv_head = item % spans, item // spans % items, item // spans // items
    group, tokens, row = heads // kv_heads, len(positions), width + 2
    weights = np.empty(MOST_ROWS * CHUNK, np.float32)
    # Later items see more keys: early and late ones alternate, so that every thread's share is fair.
    m = (i // 2 if i % 2 == 0 else items - 1 - i // 2) * per_item
    end, first = min(tokens, m + per_item), span * SPAN
    while m < end:
        run = 1
        while m + run < end and sequence_of[m + run] == sequence_of[m]:
            run += 1
        last = positions[m + run - 1]
        blocks, head = block_tables[sequence_of[m]], kv_head * group
        q_at, part_at = m * q_width + head * head_dim, ((m * heads + head) * spans + span) * row
        if first > last:
            pass  # none of them sees this span
        elif run < UNPACK:
            for j in range(run):  # token by token, the heads that share keys as rows
                _rows_of_tiles(
                    group, q, q_at + j * q_width, head_dim, keys, values, key_scales, value_scales, blocks, kv_head,
                    positions[m] + j, 0, window, scale, alibi, head, first, 0, parts,
                    part_at + j * heads * spans * row, spans * row, weights,
                )  # fmt: skip
        else:
            one_page, many = np.zeros(1, np.int32), SPAN if key_scales.size else 0
            flat = (
                np.empty((1, 1, head_dim, SPAN), np.float32),
                np.empty((1, 1, SPAN, width), np.float32),
                np.empty((1, 1, many), np.float32),
                np.empty((1, 1, many), np.float32),
            )
            count = min(SPAN, last + 1 - first)
            _unpack(keys, values, key_scales, value_scales, blocks, kv_head, first, count, flat)
            for j in range(group):  # head by head, the tokens as rows
                _rows_of_tiles(
                    run, q, q_at + j * head_dim, q_width, flat[0], flat[1], flat[2], flat[3], one_page, 0,
                    positions[m] - first, 1, window, scale, alibi, head + j, 0, first, parts,
                    part_at + j * spans * row, heads * spans * row, weights,
                )  # fmt: skip
        m += run


@kernel
def _merged_spans(item, heads, positions, spans, parts, width, out, head_dim):
    """One token and one query head: its spans, merged in their order."""
    first = item * spans * (width + 2)
    for span in range(1, positions[item // heads] // SPAN + 1):
        _merge(parts, first, parts, first + span * (width + 2), width)
    _answer(parts, first, width, out, item * head_dim, head_dim)


@parallel_kernel
def attention(
    qkv, heads, keys, values, key_scales, value_scales, block_tables, sequence_of, positions, scale, window, alibi
):
    """softmax((q · kᵀ + alibi) · scale) · v of every token over its own sequence, up to and with itself.

    qkv (tokens, (heads + 2·kv_heads)·head_dim), the cache as tensor/kv_cache.py wrote it, block_tables (sequences,
    most blocks) int32, sequence_of and positions (tokens,) int64, tokens of a sequence side by side and in order;
    window: how many keys back a query sees, 0 for all; alibi (heads, positions up to a multiple of 64) is what a key's
    position adds to its scores, or (0, 0). Query head h reads key head h // (heads // kv_heads), which makes MHA, GQA
    and MQA one rule; kv_heads divides heads. -> (tokens, heads·head_dim)
    """
    tokens, head_dim, kv_heads, width = qkv.shape[0], keys.shape[2], keys.shape[1], values.shape[3]
    q, q_width = qkv.ravel(), qkv.shape[1]
    out = np.empty(tokens * heads * head_dim, np.float32)
    spans = positions.max() // SPAN + 1
    parts = np.empty(tokens * heads * spans * (width + 2), np.float32)
    per_item = max(1, min(ITEM, tokens // 8))
    items = (tokens + per_item - 1) // per_item
    for item in prange(kv_heads * items * spans):
        _span_of_tokens(
            np.int64(item), per_item, spans, items, q, q_width, heads, keys, values, key_scales, value_scales,
            block_tables, sequence_of, positions, scale, window, alibi, parts,
        )  # fmt: skip
    for item in prange(tokens * heads):
        _merged_spans(np.int64(item), heads, positions, spans, parts, width, out, head_dim)
    return out.reshape((tokens, heads * head_dim))
