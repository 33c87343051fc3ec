"""Paged attention: causal attention over a paged KV cache, one pass over the keys with a running softmax.

FlashAttention's recurrence: Dao et al. 2022, arXiv:2205.14135; keys split among threads when decoding: Dao et al. 2023,
"Flash-Decoding". kv_cache.py says how a page lies in memory.

Every query walks its keys in chunks of 64 and spans of 512, both from multiples of their size, whoever else is in the
batch; what the spans come to is merged in their order. Queries that see the same keys, which are the query heads that
share a key head and the neighbouring tokens of a prompt, are the rows of register tiles that load each key once, and
chunk after chunk is gone through by all tiles, so that it stays in the nearest cache. A query for which a chunk is
wholly masked is left as it was, to the bit, unless the chunk holds values not finite. Beside keys and values in
bfloat16 queries and weights are rounded to it as well, and multiplied in pairs (bfloat16.py); sums are float32.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from tinyserve.tensor._jit import inline_kernel, kernel
from tinyserve.tensor.bfloat16 import add_weights, first_of_pairs, keep, numbers_per_word, store_numbers
from tinyserve.tensor.kv_cache import Heads, Pages, Tokens
from tinyserve.tensor.native import stack_array
from tinyserve.tensor.program import constant, empty, instruction, num_threads
from tinyserve.tensor.simd import (
    LANES,
    WIDE,
    exp,
    first_lanes,
    fma,
    larger,
    larger_lane,
    load,
    splat,
    store,
    store_first,
    sum_lanes,
)
from tinyserve.tensor.thread_pool import from_the_end, next_items, own_items
from tinyserve.tensor.tiles import (
    fma_rows,
    load_panels,
    load_rows,
    load_tile,
    prefetch_panels,
    scale_rows,
    store_rows,
    zeros,
)

Array = np.ndarray

CHUNK = 4 * LANES  # keys that one step of the running softmax takes in
SPAN = 8 * CHUNK  # keys after which a query's sums begin anew
# Queries that share the keys they load, and vectors of keys: as many sums as fit the registers, and no more.
MOST_ROWS, PANELS = (4, 4) if WIDE else (3, 2)
RUN, RUN_ROWS = 48, 144  # tokens, and queries, that one thread takes at once, at most
UNPACK = 16  # queries for which a chunk is put together first, int8 as float32
MOST_SUMS = 1 << 23  # numbers (32 MB) that sums of spans may take, so that several threads share one query
SCORES = MOST_ROWS * CHUNK
APART = 1024  # words between what two threads work in, so that neither prefetches what the other writes
LARGEST, WEIGHT = LANES, LANES - 1  # where in a row of sums, from its end, are its largest score and its sum of weights


@constant
class Scoring(NamedTuple):
    """What turns q · k into the score (q · k + bias) · scale, and which keys have one."""

    scale: np.float32
    window: int  # how many keys back a query sees, itself among them; 0: all
    alibi: Array  # (heads, positions up to a multiple of 64) float32, a key's bias; (0, 0) for none


class Scratch(NamedTuple):
    """What each thread works in, (threads, ..). A row of sums is a vector longer than a value: the weighted values,
    then the largest score and the sum of weights. The others are float32, or pairs of bfloat16 where the cache is.
    """

    queries: Array  # side by side
    sums: Array  # (.., rows, row) float32: each query's over one span
    totals: Array  # (.., rows, row) float32: each query's over the spans before
    keys: Array  # a chunk's
    values: Array
    weights: Array  # of a tile's queries: a chunk's values are multiplied by them


class Rows(NamedTuple):
    """Queries that see the same keys: the heads of one key head, for a token and its successors."""

    queries: Array
    weights: Array
    sums: Array
    length: int
    position: int  # of the first token
    head: int  # of a token's first query
    group: int  # queries of a token
    words: int  # of a query: its numbers, or pairs of them


class Chunk(NamedTuple):
    """64 keys from `start` on, a multiple of 64: arrays, and where in them each 16 keys are, as flat indices."""

    keys: Array
    values: Array
    key_scales: Array
    value_scales: Array
    start: int
    key_stride: int  # from a number of a key to the next
    keys_at: tuple[int, int, int, int]
    values_at: tuple[int, int, int, int]
    scales_at: tuple[int, int, int, int]


class Unit(NamedTuple):
    """Work that one thread does: some tokens of one sequence, from token `first` of the batch on, and some spans."""

    first: int
    tokens: int
    span: int
    last_span: int


def attention(qkv: Array, heads: Heads, scoring: Scoring, tokens: Tokens, pages: Pages) -> Array:
    """softmax((q · kᵀ + alibi) · scale) · v of every token over its own sequence, up to and with itself.

    qkv (tokens, (heads + 2·kv_heads)·head_dim), of which the queries are read -> (tokens, heads·head_dim).
    """
    count, threads, group = len(qkv), num_threads(), heads.heads // heads.kv_heads
    run = max(1, min(RUN, RUN_ROWS // group, count // 8))  # tokens of a unit
    width = pages.values.shape[3]
    row = width + LANES
    # A program is recorded for a block table of this width, and serves sequences of all depths that it has room for.
    spans = -(-tokens.block_tables.shape[1] * pages.keys.shape[3] // SPAN)
    if scoring.window:
        spans = min(spans, (scoring.window - 2) // SPAN + 2)
    busy = heads.kv_heads * (count // run) >= 4 * threads  # without sharing a query
    if spans == 1 or busy or count * heads.heads * spans * row > MOST_SUMS:
        spans = 0
    numbers, words = (2, np.uint32) if pages.keys.dtype == np.uint32 else (1, np.float32)
    query, rows = pages.keys.shape[2], run * group + APART // row + 1
    scratch = Scratch(
        queries=empty((threads, run * group * query + APART), words),
        sums=empty((threads, rows, row)),
        totals=empty((threads, rows, row)),
        keys=empty((threads, query * CHUNK + APART), words),
        values=empty((threads, CHUNK // numbers * width + APART), words),
        weights=empty((threads, SCORES // numbers + APART), words),
    )
    parts = empty((count * heads.heads, spans, row))
    out = empty((count, heads.heads * heads.head_dim))
    _attend(qkv, heads, scoring, tokens, pages, run, scratch, parts, out)
    if spans:
        _merge_spans(heads, scoring.window, tokens.positions, parts, out)
    return out


@instruction
def _attend(team, qkv, heads, scoring, tokens, pages, run, scratch, parts, out):
    """Compute units of at most `run` tokens and one key head.

    Where `parts` (tokens · heads, spans, row) has room, a unit is one span, and a query of several spans leaves their
    sums there; else a unit is all spans, and its queries are finished.
    """
    own = Scratch(
        scratch.queries[team.thread],
        scratch.sums[team.thread],
        scratch.totals[team.thread],
        scratch.keys[team.thread],
        scratch.values[team.thread],
        scratch.weights[team.thread],
    )
    count = heads.kv_heads * _count_units(tokens, run, parts.shape[1], scoring.window)
    first, end = next_items(team, count)
    while first < count:
        for i in range(first, end):
            # Of a thread's tokens of a prompt the last see the most keys, and come first. The key heads of a page lie
            # side by side.
            item = from_the_end(team, count, i) if len(tokens.positions) > len(tokens.block_tables) else i
            unit = _find_unit(item // heads.kv_heads, tokens, run, parts.shape[1], scoring.window)
            _attend_unit(qkv, heads, scoring, tokens, pages, own, parts, out, unit, item % heads.kv_heads)
        first, end = next_items(team, count)


@instruction
def _merge_spans(team, heads, window, positions, parts, out):
    """Merge, in their order, what the spans of each query came to, where there are several."""
    first, end = own_items(team, len(positions) * heads.heads)
    for item in range(first, end):
        position = positions[item // heads.heads]
        spans = position // SPAN - _first_key(position, window) // SPAN
        for span in range(1, spans + 1):
            _merge(parts[item], 0, parts[item], span)
        if spans > 0:
            _answer(parts[item], 0, out, item, heads.head_dim)


# --- units of work ----------------------------------------------------------------------------------------------------


@kernel
def _first_key(position, window):
    """The first position that a query at `position` sees."""
    return max(0, position - window + 1) if window > 0 else 0


@kernel
def _run_from(first, tokens, run, window):
    """The tokens from token `first` on that are of one sequence, at most `run`, with all their spans."""
    count, positions, sequence_of = 1, tokens.positions, tokens.sequence_of
    position = positions[first]
    while count < run and first + count < len(positions) and sequence_of[first + count] == sequence_of[first]:
        if positions[first + count] != position + count:
            break  # the tokens between them are not wanted
        count += 1
    return Unit(first, count, _first_key(position, window) // SPAN, (position + count - 1) // SPAN)


@kernel
def _count_units(tokens, run, spans, window):
    first = units = 0
    while first < len(tokens.positions):
        unit = _run_from(first, tokens, run, window)
        units += unit.last_span - unit.span + 1 if spans > 0 else 1
        first += unit.tokens
    return units


@kernel
def _find_unit(index, tokens, run, spans, window):
    """The unit of this number, below `_count_units`."""
    unit = _run_from(0, tokens, run, window)
    while True:
        units = unit.last_span - unit.span + 1 if spans > 0 else 1
        if index < units:
            break
        index -= units
        unit = _run_from(unit.first + unit.tokens, tokens, run, window)
    if spans == 0:
        return unit
    return Unit(unit.first, unit.tokens, unit.span + index, unit.span + index)


@kernel
def _attend_unit(qkv, heads, scoring, tokens, pages, own, parts, out, unit, kv_head):
    group = heads.heads // heads.kv_heads
    position, head = tokens.positions[unit.first], kv_head * group
    words = pages.keys.shape[2]
    rows = Rows(own.queries, own.weights, own.sums, unit.tokens * group, position, head, group, words)
    sequence, last = tokens.sequence_of[unit.first], position + unit.tokens - 1
    blocks = tokens.block_tables[sequence]
    _gather_queries(rows, qkv, unit, heads.head_dim)
    for span in range(unit.span, unit.last_span + 1):
        _clear_sums(rows)
        first = max(span * SPAN, _first_key(position, scoring.window) // CHUNK * CHUNK)
        stop = min(last + 1, span * SPAN + SPAN)
        for start in range(first, stop, CHUNK):
            chunk = _find_chunk(pages, blocks, kv_head, start, last)
            if rows.length >= UNPACK:
                _take_in_unpacked(rows, _unpack(chunk, own, words, pages.values.shape[3]), chunk, scoring)
                continue
            # What this thread will read next: the sequence goes on, or is another key head's, or there is another one.
            ahead, ahead_last, ahead_head, ahead_sequence = start + CHUNK, last, kv_head, sequence
            if ahead >= stop and span == unit.last_span:
                ahead_head = (kv_head + 1) % heads.kv_heads
                if ahead_head > 0:
                    ahead = first
                elif ahead > last and unit.first + unit.tokens < len(tokens.positions):
                    ahead_sequence = tokens.sequence_of[unit.first + unit.tokens]
                    ahead_last = tokens.positions[unit.first + unit.tokens]
                    ahead = _first_key(ahead_last, scoring.window) // CHUNK * CHUNK
            if ahead > ahead_last:
                ahead = ahead_last // LANES * LANES
            ahead_blocks = tokens.block_tables[ahead_sequence]
            _take_in_packed(rows, chunk, _find_chunk(pages, ahead_blocks, ahead_head, ahead, ahead_last), scoring)
        for r in range(rows.length):
            row_position = position + r // group
            query = (unit.first + r // group) * heads.heads + head + r % group
            first_span = _first_key(row_position, scoring.window) // SPAN
            last_span = row_position // SPAN
            if span < first_span or span > last_span:
                continue
            if first_span == last_span:
                _answer(own.sums, r, out, query, heads.head_dim)
            elif parts.shape[1] > 0:
                _copy(own.sums, r, parts[query], span - first_span)
            else:
                if span == first_span:
                    _copy(own.sums, r, own.totals, r)
                else:
                    _merge(own.totals, r, own.sums, r)
                if span == last_span:
                    _answer(own.totals, r, out, query, heads.head_dim)


@kernel
def _gather_queries(rows, qkv, unit, head_dim):
    numbers, one, width = numbers_per_word(rows.queries), np.float32(1.0), qkv.shape[1]
    for r in range(rows.length):
        at = (unit.first + r // rows.group) * width + (rows.head + r % rows.group) * head_dim
        if head_dim % (2 * LANES) == 0:
            for d in range(0, head_dim, 2 * LANES):
                store_numbers(rows.queries, r * head_dim + d, load(qkv, at + d), load(qkv, at + d + LANES))
            continue
        for d in range(head_dim):
            number = qkv[at // width, at % width + d]
            keep(rows.queries, r * rows.words + d // numbers, d % numbers, number, one)
        if head_dim % numbers:
            keep(rows.queries, (r + 1) * rows.words - 1, 1, np.float32(0.0), one)


# --- sums: arrays (.., row), of which one row is meant ----------------------------------------------------------------


@kernel
def _clear_sums(rows):
    row = rows.sums.shape[1]
    for r in range(rows.length):
        for d in range(0, row, LANES):
            store(rows.sums, r * row + d, splat(np.float32(0.0)))
        rows.sums[r, row - LARGEST] = -np.inf


@kernel
def _copy(sums, r, target, target_r):
    row = sums.shape[1]
    for d in range(0, row, LANES):
        store(target, target_r * row + d, load(sums, r * row + d))


@kernel
def _merge(totals, r, sums, sums_r):
    """Take a span's sums into the total of the spans before it; one that saw no key changes nothing."""
    row = totals.shape[1]
    ours, theirs, weight = totals[r, row - LARGEST], sums[sums_r, row - LARGEST], sums[sums_r, row - WEIGHT]
    if not theirs > -np.inf and weight == 0:
        return
    largest = max(ours, theirs)
    a, b = np.exp(ours - largest), np.exp(theirs - largest)
    for d in range(0, row - LANES, LANES):
        at = r * row + d
        store(totals, at, fma(load(sums, sums_r * row + d), splat(b), load(totals, at) * splat(a)))
    totals[r, row - LARGEST] = largest
    totals[r, row - WEIGHT] = totals[r, row - WEIGHT] * a + weight * b


@kernel
def _answer(sums, r, out, query, head_dim):
    """The weighted mean of the values."""
    row = sums.shape[1]
    inverse = splat(np.float32(1.0) / sums[r, row - WEIGHT])
    for d in range(0, head_dim, LANES):
        store_first(out, query * head_dim + d, load(sums, r * row + d) * inverse, head_dim - d)


# --- chunks of keys ---------------------------------------------------------------------------------------------------


@inline_kernel
def _find_chunk(pages, blocks, kv_head, start, last):
    """The chunk at `start` of a sequence in these blocks; 16 keys past `last` are the first again, to be masked."""
    s0 = _scale_address(pages, blocks, kv_head, start)
    s1 = _scale_address(pages, blocks, kv_head, start + LANES if start + LANES <= last else start)
    s2 = _scale_address(pages, blocks, kv_head, start + 2 * LANES if start + 2 * LANES <= last else start)
    s3 = _scale_address(pages, blocks, kv_head, start + 3 * LANES if start + 3 * LANES <= last else start)
    words, block_size, width = pages.keys.shape[2], pages.keys.shape[3], pages.values.shape[3]
    n = numbers_per_word(pages.values)
    return Chunk(
        pages.keys, pages.values, pages.key_scales, pages.value_scales, start, block_size,
        (
            _key_address(s0, words, block_size), _key_address(s1, words, block_size),
            _key_address(s2, words, block_size), _key_address(s3, words, block_size),
        ),
        (s0 // n * width, s1 // n * width, s2 // n * width, s3 // n * width),
        (s0, s1, s2, s3),
    )  # fmt: skip


@inline_kernel
def _scale_address(pages, blocks, kv_head, key):
    """The flat index of a key in (blocks, kv_heads, block_size)."""
    block_size = pages.keys.shape[3]
    return (np.int64(blocks[key // block_size]) * pages.keys.shape[1] + kv_head) * block_size + key % block_size


@kernel
def _key_address(scale_at, words, block_size):
    """The same of its first word in (blocks, kv_heads, words, block_size)."""
    offset = scale_at % block_size
    return (scale_at - offset) * words + offset


@kernel
def _unpack(chunk, own, words, width):
    """The chunk's keys (words, 64) and values (64 keys or 32 pairs of them, width), side by side."""
    n = LANES // numbers_per_word(own.values) * width
    for i in range(CHUNK // LANES):
        at = chunk.keys_at[i]
        for d in range(words):
            store(own.keys, d * CHUNK + i * LANES, load(chunk.keys, at + d * chunk.key_stride))
        at = chunk.values_at[i]
        for d in range(0, n, LANES):
            store(own.values, i * n + d, load(chunk.values, at + d))
    return Chunk(
        own.keys, own.values, chunk.key_scales, chunk.value_scales, chunk.start, CHUNK,
        (0, LANES, 2 * LANES, 3 * LANES), (0, n, 2 * n, 3 * n), chunk.scales_at,
    )  # fmt: skip


@inline_kernel
def _value_address(chunk, word, width):
    """The flat index of a word of values: a key's, or two keys'."""
    words = LANES // numbers_per_word(chunk.values)
    return chunk.values_at[word // words] + word % words * width


# --- one chunk --------------------------------------------------------------------------------------------------------


@kernel
def _score(scores, at, i, chunk, scoring, head):
    """(q · k + alibi) · scale of vector i of a row's chunk."""
    s = load(scores, at + i * LANES)
    if chunk.key_scales.size:
        s = s * load(chunk.key_scales, chunk.scales_at[i])
    if scoring.alibi.size:
        s = s + load(scoring.alibi, head * scoring.alibi.shape[1] + chunk.start + i * LANES)
    return s * splat(scoring.scale)


@inline_kernel
def _score_row(scores, at, rows, r, chunk, scoring):
    """Turn q · k of a row's chunk into scores, -inf for keys that it does not see; returns the largest."""
    position, head = rows.position + r // rows.group, rows.head + r % rows.group
    first, count = _first_key(position, scoring.window) - chunk.start, position + 1 - chunk.start
    s0, s1 = _score(scores, at, 0, chunk, scoring, head), _score(scores, at, 1, chunk, scoring, head)
    s2, s3 = _score(scores, at, 2, chunk, scoring, head), _score(scores, at, 3, chunk, scoring, head)
    minus_infinity = splat(np.float32(-np.inf))
    if count < CHUNK:
        s0 = first_lanes(s0, minus_infinity, count)
        s1 = first_lanes(s1, minus_infinity, count - LANES)
        s2 = first_lanes(s2, minus_infinity, count - 2 * LANES)
        s3 = first_lanes(s3, minus_infinity, count - 3 * LANES)
    if first > 0:
        s0 = first_lanes(minus_infinity, s0, first)
        s1 = first_lanes(minus_infinity, s1, first - LANES)
        s2 = first_lanes(minus_infinity, s2, first - 2 * LANES)
        s3 = first_lanes(minus_infinity, s3, first - 3 * LANES)
    store(scores, at, s0)
    store(scores, at + LANES, s1)
    store(scores, at + 2 * LANES, s2)
    store(scores, at + 3 * LANES, s3)
    return larger_lane(larger(larger(s0, s1), larger(s2, s3)))


@inline_kernel
def _weigh_row(scores, at, largest, weights, chunk):
    """The weights of a row's chunk, beside its largest score so far; returns their sum."""
    # Nothing seen yet and nothing here: any finite shift gives weights of zero, where -inf would give nan.
    shift = splat(largest if largest > -np.inf else np.float32(0.0))
    p0, p1 = exp(load(scores, at) - shift), exp(load(scores, at + LANES) - shift)
    p2, p3 = exp(load(scores, at + 2 * LANES) - shift), exp(load(scores, at + 3 * LANES) - shift)
    total = sum_lanes(add_weights(weights, p0, p1, p2, p3))
    if chunk.value_scales.size:
        p0 = p0 * load(chunk.value_scales, chunk.scales_at[0])
        p1 = p1 * load(chunk.value_scales, chunk.scales_at[1])
        p2 = p2 * load(chunk.value_scales, chunk.scales_at[2])
        p3 = p3 * load(chunk.value_scales, chunk.scales_at[3])
    store_numbers(weights, at, p0, p1)
    store_numbers(weights, at + 2 * LANES, p2, p3)
    return total


@inline_kernel
def _ask_again(ahead, part, parts, words, width):
    """Ask memory for a part of the lines of a chunk's keys and values."""
    a0, a1, a2, a3 = ahead.keys_at
    for d in range(part * words // parts, (part + 1) * words // parts):
        at = d * ahead.key_stride
        prefetch_panels(2, ahead.keys, a0 + at, a1 - a0)
        prefetch_panels(2, ahead.keys, a2 + at, a3 - a2)
    lines = width // numbers_per_word(ahead.values)  # vectors of 16 keys' values
    for group in range(CHUNK // LANES):
        for i in range(part * lines // parts, (part + 1) * lines // parts):
            prefetch_panels(1, ahead.values, ahead.values_at[group] + i * LANES, 0)


@cache
def _tile(ROWS, IS_PACKED):
    """A kernel that adds a chunk to the sums of ROWS rows from `first` on, of which the last is at position `last`.

    While it works on pages it asks memory for those of the chunk `ahead`: they are too short, and too far from each
    other, for a processor to foresee. It asks twice for each line, since a processor drops what it has no room for.
    """
    SIZE = ROWS * PANELS

    @inline_kernel
    def tile(rows, first, last, chunk, ahead, scoring, scores, shrink):
        words, row, numbers = rows.words, rows.sums.shape[1], numbers_per_word(rows.weights)
        width, weights_row = row - LANES, CHUNK // numbers
        for p in range(0, CHUNK // LANES, PANELS):
            k0, k1 = chunk.keys_at[p], chunk.keys_at[p + 1]
            k2, k3 = chunk.keys_at[(p + 2) % 4], chunk.keys_at[(p + 3) % 4]  # of which a tile of two makes no use
            a0, a1, a2, a3 = ahead.keys_at
            products = zeros(SIZE)
            for d in range(words):
                at = d * chunk.key_stride
                if IS_PACKED:
                    prefetch_panels(2, ahead.keys, a0 + at, a1 - a0)
                    prefetch_panels(2, ahead.keys, a2 + at, a3 - a2)
                panels = load_panels(PANELS, chunk.keys, k0 + at, k1 + at, k2 + at, k3 + at)
                products = fma_rows(products, panels, rows.queries, first * words + d, words)
            store_rows(scores, p * LANES, CHUNK, products, PANELS, CHUNK)
        # All rows' scores, then all rows' weights: a row's own are a long chain of instructions, of which each waits.
        for r in range(ROWS):
            if IS_PACKED:
                _ask_again(ahead, r, ROWS, words, width)
            largest, at = _score_row(scores, r * CHUNK, rows, first + r, chunk, scoring), row - LARGEST
            before = rows.sums[first + r, at]
            largest = max(before, largest)
            rows.sums[first + r, at] = largest
            shrink[r] = before - largest if before < largest else np.float32(0.0)
        store(shrink, 0, exp(load(shrink, 0)))
        for r in range(ROWS):
            total, at = rows.sums[first + r, row - WEIGHT], row - WEIGHT
            largest = rows.sums[first + r, row - LARGEST]
            rows.sums[first + r, at] = total * shrink[r] + _weigh_row(scores, r * CHUNK, largest, rows.weights, chunk)
        stop, many = min(CHUNK, last + 1 - chunk.start), PANELS * LANES
        whole = stop // numbers  # words; a last key that is alone in its word comes behind them
        for d in range(0, width // many * many, many):
            total = scale_rows(load_rows(ROWS, PANELS, rows.sums, first * row + d, row), PANELS, shrink)
            for i in range(0, whole, LANES // numbers):  # neighbours of a page
                group = i * numbers // LANES
                at, ahead_at = chunk.values_at[group] + d, ahead.values_at[group] + d
                for word in range(i, min(i + LANES // numbers, whole)):
                    if IS_PACKED:
                        prefetch_panels(PANELS, ahead.values, ahead_at, LANES)
                    values = load_tile(PANELS, chunk.values, at, LANES)
                    total = fma_rows(total, values, rows.weights, word, weights_row)
                    at += width
                    ahead_at += width
            if numbers * whole < stop:
                values = load_tile(PANELS, chunk.values, _value_address(chunk, whole, width) + d, LANES)
                total = fma_rows(total, first_of_pairs(chunk.values, values), rows.weights, whole, weights_row)
            store_rows(rows.sums, first * row + d, row, total, PANELS, many)
        for d in range(width // many * many, width, LANES):
            narrow = scale_rows(load_rows(ROWS, 1, rows.sums, first * row + d, row), 1, shrink)
            for word in range(whole):
                value = load_tile(1, chunk.values, _value_address(chunk, word, width) + d, LANES)
                narrow = fma_rows(narrow, value, rows.weights, word, weights_row)
            if numbers * whole < stop:
                value = load_tile(1, chunk.values, _value_address(chunk, whole, width) + d, LANES)
                narrow = fma_rows(narrow, first_of_pairs(chunk.values, value), rows.weights, whole, weights_row)
            store_rows(rows.sums, first * row + d, row, narrow, 1, LANES)

    return tile


def _tiles(IS_PACKED):
    """A kernel that adds a chunk to the sums of all rows that see it, in tiles of about the same size."""
    tile_1, tile_2 = _tile(1, IS_PACKED), _tile(2, IS_PACKED)
    tile_less, tile_most = _tile(MOST_ROWS - 1, IS_PACKED), _tile(MOST_ROWS, IS_PACKED)

    @kernel
    def take_in(rows, chunk, ahead, scoring):
        scores, shrink = stack_array(SCORES, np.float32), stack_array(LANES, np.float32)
        store(shrink, 0, splat(np.float32(0.0)))
        r = 0
        while r < rows.length:
            left = rows.length - r
            tiles = (left + MOST_ROWS - 1) // MOST_ROWS
            n = (left + tiles - 1) // tiles
            last = rows.position + (r + n - 1) // rows.group
            first = _first_key(rows.position + r // rows.group, scoring.window)
            if chunk.start <= last and first < chunk.start + CHUNK:
                if n == MOST_ROWS:
                    tile_most(rows, r, last, chunk, ahead, scoring, scores, shrink)
                elif n == MOST_ROWS - 1:
                    tile_less(rows, r, last, chunk, ahead, scoring, scores, shrink)
                elif IS_PACKED:  # UNPACK rows come in the two largest tiles
                    if n == 2:
                        tile_2(rows, r, last, chunk, ahead, scoring, scores, shrink)
                    else:
                        tile_1(rows, r, last, chunk, ahead, scoring, scores, shrink)
            r += n

    return take_in


_take_in_packed, _take_in_unpacked = _tiles(True), _tiles(False)
