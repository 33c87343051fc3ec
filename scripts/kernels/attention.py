"""Causal attention, from the obvious loops to the kernel that tinyserve runs: each checked, each timed.

    python scripts/kernels/attention.py
    python scripts/kernels/attention.py --tokens 512 --keys 512 --heads 9 --kv-heads 3 --head-dim 64

One sequence, whose last `tokens` are the queries: 512 over as many keys (a prompt), or one over 4096 (a token that is
decoded, for which keys and values are made to come from memory). A head of keys and values serves several of queries.
What was learned is said in each version's first lines, and in docs/kernels.md with figures.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np

from tinyserve.tensor import _jit, reference
from tinyserve.tensor import attention as tinyserve
from tinyserve.tensor._jit import cached_kernel, kernel
from tinyserve.tensor.kv_cache import Heads, Pages, Tokens
from tinyserve.tensor.mamba2 import broadcast
from tinyserve.tensor.simd import LANES, exp, first_lanes, fma, load, max_lane, maximum, splat, store, sum_lanes
from tinyserve.tensor.tiles import fma_rows, load_rows, load_tile, store_rows, zeros

sys.path.insert(0, str(Path(__file__).parent))
import _workshop

Array = np.ndarray

CHUNK = 4 * LANES  # keys
ROWS, PANELS = 3, 2  # of a register tile: queries, and vectors of keys or of values
NO_SCALES = np.zeros((0, 0, 0), np.float32)
NO_ALIBI = np.zeros((0, 0), np.float32)

# Every version: q (tokens, heads, head_dim), keys and values as their packing left them, `count` keys in all, and the
# scale of the scores -> (tokens, heads, head_dim). Query m sees the keys up to its own, which is count - tokens + m.


@cached_kernel
def v1_obvious_loops(q, k, v, count, scale):
    """Softmax as it is written: all scores of a query, their maximum, their exponentials, the mean of the values."""
    tokens, heads, head_dim = q.shape
    group = heads // k.shape[1]
    out, scores = np.zeros(q.shape, np.float32), np.empty(count, np.float32)
    for m in range(tokens):
        seen = count - tokens + m + 1
        for head in range(heads):
            for key in range(seen):
                score = np.float32(0.0)
                for d in range(head_dim):
                    score += q[m, head, d] * k[key, head // group, d]
                scores[key] = score * scale
            largest, total = scores[:seen].max(), np.float32(0.0)
            for key in range(seen):
                scores[key] = np.exp(scores[key] - largest)
                total += scores[key]
            for key in range(seen):
                for d in range(head_dim):
                    out[m, head, d] += scores[key] / total * v[key, head // group, d]
    return out


@kernel
def _score(q, q_at, k, k_at, head_dim):
    total = splat(np.float32(0.0))
    for d in range(0, head_dim, LANES):
        total = fma(load(q, q_at + d), load(k, k_at + d), total)
    return sum_lanes(total)


@cached_kernel
def v2_lanes_of_head_dim(q, k, v, count, scale):
    """A vector is 16 numbers along head_dim, as they lie: every score ends in a sum over lanes."""
    tokens, heads, head_dim = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    out, weights = np.empty(q.shape, np.float32), np.empty(count, np.float32)
    for m in range(tokens):
        seen = count - tokens + m + 1
        for head in range(heads):
            at, first, stride = (m * heads + head) * head_dim, head // group * head_dim, kv_heads * head_dim
            for key in range(seen):
                weights[key] = _score(q, at, k, first + key * stride, head_dim) * scale
            largest, total = weights[:seen].max(), np.float32(0.0)
            for key in range(seen):
                weights[key] = np.exp(weights[key] - largest)
                total += weights[key]
            for d in range(0, head_dim, LANES):
                mean = splat(np.float32(0.0))
                for key in range(seen):
                    mean = fma(broadcast(weights, key), load(v, first + key * stride + d), mean)
                store(out, at + d, mean * splat(np.float32(1.0) / total))
    return out


@cached_kernel
def v3_running_softmax(q, k, v, count, scale):
    """One pass, key by key: when a larger score comes, what has been added up shrinks to match (FlashAttention).

    No scores are kept, however many keys; but the sums go to the nearest cache and back with every one of them.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    out = np.zeros(q.shape, np.float32)
    for m in range(tokens):
        for head in range(heads):
            at, largest, total = (m * heads + head) * head_dim, np.float32(-np.inf), np.float32(0.0)
            for key in range(count - tokens + m + 1):
                kv_at = (key * kv_heads + head // group) * head_dim
                score = _score(q, at, k, kv_at, head_dim) * scale
                shrink = np.float32(1.0)
                if score > largest:
                    shrink, largest = np.exp(largest - score), score
                weight = np.exp(score - largest)
                total = total * shrink + weight
                for d in range(0, head_dim, LANES):
                    store(out, at + d, fma(splat(weight), load(v, kv_at + d), splat(shrink) * load(out, at + d)))
            for d in range(0, head_dim, LANES):
                store(out, at + d, load(out, at + d) * splat(np.float32(1.0) / total))
    return out


@cached_kernel
def v4_keys_transposed(q, k, v, count, scale):
    """Keys lie (kv_heads, keys/16, head_dim, 16): 16 keys a vector. No sum over lanes; 16 exponentials at once.

    But 16 scores are one chain of head_dim steps, each waiting for the one before.
    """
    tokens, heads, head_dim = q.shape
    group, width, padded = heads // k.shape[0], v.shape[2], v.shape[1]
    out, weights = np.zeros(q.shape, np.float32), np.empty(LANES, np.float32)
    for m in range(tokens):
        seen = count - tokens + m + 1
        for head in range(heads):
            at, first, kv = (m * heads + head) * head_dim, head // group * padded * head_dim, head // group * padded
            largest, total = np.float32(-np.inf), np.float32(0.0)
            for start in range(0, seen, LANES):
                scores = splat(np.float32(0.0))
                for d in range(head_dim):
                    scores = fma(load(k, first + start * head_dim + d * LANES), broadcast(q, at + d), scores)
                scores = first_lanes(scores * splat(scale), splat(np.float32(-np.inf)), seen - start)
                before, largest = largest, max(largest, max_lane(scores))
                shrink, p = np.exp(before - largest), exp(scores - splat(largest))
                store(weights, 0, p)
                total = total * shrink + sum_lanes(p)
                for d in range(0, head_dim, LANES):
                    mean = load(out, at + d) * splat(shrink)
                    for i in range(min(LANES, seen - start)):
                        mean = fma(broadcast(weights, i), load(v, (kv + start + i) * width + d), mean)
                    store(out, at + d, mean)
            for d in range(0, head_dim, LANES):
                store(out, at + d, load(out, at + d) * splat(np.float32(1.0) / total))
    return out


@kernel
def _softmax_step(weights, at, count, scale, sums, row, width):
    """Turn a chunk's scores of a row into weights, zero from `count` on, and shrink its past to match.

    Row `row` of sums is: weighted values (width,), largest score, sum of weights.
    """
    minus_infinity, past = splat(np.float32(-np.inf)), row * (width + 2)
    s0 = first_lanes(load(weights, at) * splat(scale), minus_infinity, count)
    s1 = first_lanes(load(weights, at + LANES) * splat(scale), minus_infinity, count - LANES)
    s2 = first_lanes(load(weights, at + 2 * LANES) * splat(scale), minus_infinity, count - 2 * LANES)
    s3 = first_lanes(load(weights, at + 3 * LANES) * splat(scale), minus_infinity, count - 3 * LANES)
    before = sums[row, width]
    largest = max(before, max_lane(maximum(maximum(s0, s1), maximum(s2, s3))))
    shift = splat(largest)
    p0, p1, p2, p3 = exp(s0 - shift), exp(s1 - shift), exp(s2 - shift), exp(s3 - shift)
    store(weights, at, p0)
    store(weights, at + LANES, p1)
    store(weights, at + 2 * LANES, p2)
    store(weights, at + 3 * LANES, p3)
    if largest > before:
        shrink = np.exp(before - largest)
        for d in range(0, width, LANES):
            store(sums, past + d, load(sums, past + d) * splat(shrink))
        sums[row, width], sums[row, width + 1] = largest, sums[row, width + 1] * shrink
    sums[row, width + 1] += sum_lanes((p0 + p1) + (p2 + p3))


def _query_tile(ROWS):
    SIZE = ROWS * PANELS

    @kernel
    def tile(q, m, head, k, v, seen, scale, sums, weights, out):
        kv_heads, head_dim, padded, width = k.shape[0], k.shape[2], v.shape[1], v.shape[2]
        at, kv = (m * q.shape[1] + head) * head_dim, head // (q.shape[1] // kv_heads) * padded
        for r in range(ROWS):
            sums[r, :], sums[r, width] = 0.0, -np.inf
        for start in range(0, seen, CHUNK):
            for i in range(0, CHUNK, PANELS * LANES):
                scores = zeros(SIZE)
                for d in range(head_dim):
                    keys = load_tile(PANELS, k, (kv + start + i) * head_dim + d * LANES, head_dim * LANES)
                    scores = fma_rows(scores, keys, q, at + d, head_dim)
                store_rows(weights, i, CHUNK, scores, PANELS, CHUNK)
            for r in range(ROWS):
                _softmax_step(weights, r * CHUNK, seen - start, scale, sums, r, width)
            for d in range(0, width, PANELS * LANES):
                mean = load_rows(ROWS, PANELS, sums, d, width + 2)
                for i in range(min(CHUNK, seen - start)):
                    values = load_tile(PANELS, v, (kv + start + i) * width + d, LANES)
                    mean = fma_rows(mean, values, weights, i, CHUNK)
                store_rows(sums, d, width + 2, mean, PANELS, CHUNK)
        for r in range(ROWS):
            for d in range(head_dim):
                out[m, head + r, d] = sums[r, d] / sums[r, width + 1]

    return tile


_query_tile_1, _query_tile_3 = _query_tile(1), _query_tile(ROWS)


@cached_kernel
def v5_chunks_of_64_keys(q, k, v, count, scale):
    """Four vectors of keys a step: a maximum, a shrinking and a sum over lanes a quarter as often, and more chains."""
    tokens, heads, _ = q.shape
    sums, weights = np.empty((1, v.shape[2] + 2), np.float32), np.empty(CHUNK, np.float32)
    out = np.empty(q.shape, np.float32)
    for m in range(tokens):
        for head in range(heads):
            _query_tile_1(q, m, head, k, v, count - tokens + m + 1, scale, sums, weights, out)
    return out


@cached_kernel
def v6_register_tiles(q, k, v, count, scale):
    """Three queries share every key and value that is loaded: here the query heads of a token that share a key head.

    Without shared heads neighbouring tokens would do, each with a mask of its own: tinyserve's kernel has both.
    """
    tokens, heads, _ = q.shape
    group = heads // k.shape[0]
    sums, weights = np.empty((ROWS, v.shape[2] + 2), np.float32), np.empty(ROWS * CHUNK, np.float32)
    out = np.empty(q.shape, np.float32)
    for kv_head in range(k.shape[0]):
        for m in range(tokens):
            head, end, seen = kv_head * group, (kv_head + 1) * group, count - tokens + m + 1
            while head + ROWS <= end:
                _query_tile_3(q, m, head, k, v, seen, scale, sums, weights, out)
                head += ROWS
            while head < end:
                _query_tile_1(q, m, head, k, v, seen, scale, sums, weights, out)
                head += 1
    return out


def v7_tinyserves(q, keys, values, table, count, scale):
    """v6 over pages, spans of 512 keys, several sequences, windows and threads: tinyserve.tensor.attention.

    `keys` and `values` are pages of 16 tokens, and `table` says which page is whose.
    """
    return tinyserve.attention(*_arguments(q, keys, values, table, count, scale)).reshape(q.shape)


def _arguments(q, keys, values, table, count, scale):
    tokens, heads, head_dim = q.shape
    qkv = q.reshape(tokens, heads * head_dim)  # the keys and values behind each query are in the cache already
    positions, none = np.arange(count - tokens, count), np.zeros(tokens, np.int64)
    return (
        qkv,
        Heads(heads, keys.shape[1], head_dim),
        tinyserve.Scoring(scale, 0, NO_ALIBI),
        Tokens(positions, none, none, table),
        Pages(keys, values, NO_SCALES, NO_SCALES),
    )


# --- packing: k and v (keys, kv_heads, head_dim) -> a version's arguments -------------------------------------------


def as_they_are(k: Array, v: Array) -> tuple[Array, ...]:
    return k, v


def transposed(k: Array, v: Array) -> tuple[Array, ...]:
    """Keys (kv_heads, keys/16, head_dim, 16), values (kv_heads, keys, width), padded with zeros to whole chunks."""
    count, kv_heads, head_dim = k.shape
    keys, width = -(-count // CHUNK) * CHUNK, -(-head_dim // (PANELS * LANES)) * PANELS * LANES
    k_full, v_full = np.zeros((keys, kv_heads, head_dim), np.float32), np.zeros((kv_heads, keys, width), np.float32)
    k_full[:count], v_full[:, :count, :head_dim] = k, v.transpose(1, 0, 2)
    return np.ascontiguousarray(k_full.reshape(-1, LANES, kv_heads, head_dim).transpose(2, 0, 3, 1)), v_full


def in_pages(k: Array, v: Array) -> tuple[Array, ...]:
    """tinyserve's cache, its pages in no particular order, and the table that finds them."""
    pages, (_, kv_heads, head_dim) = -(-len(k) // LANES), k.shape
    table = np.random.default_rng(1).permutation(pages).astype(np.int32)
    padded = np.zeros((2, pages * LANES, kv_heads, head_dim), np.float32)
    padded[0, : len(k)], padded[1, : len(k)] = k, v
    keys = np.empty((pages, kv_heads, head_dim, LANES), np.float32)
    values = np.zeros((pages, kv_heads, LANES, -(-head_dim // LANES) * LANES), np.float32)
    keys[table] = padded[0].reshape(pages, LANES, kv_heads, head_dim).transpose(0, 2, 3, 1)
    values[table, :, :, :head_dim] = padded[1].reshape(pages, LANES, kv_heads, head_dim).transpose(0, 2, 1, 3)
    return keys, values, table[None]


class Version(NamedTuple):
    function: Callable[..., Array]
    pack: Callable[[Array, Array], tuple[Array, ...]]
    threads: int = 1


VERSIONS = [
    Version(v1_obvious_loops, as_they_are),
    Version(v2_lanes_of_head_dim, as_they_are),
    Version(v3_running_softmax, as_they_are),
    Version(v4_keys_transposed, transposed),
    Version(v5_chunks_of_64_keys, transposed),
    Version(v6_register_tiles, transposed),
    Version(v7_tinyserves, in_pages),
    Version(v7_tinyserves, in_pages, threads=2),
]


class Shape(NamedTuple):
    tokens: int
    keys: int
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64


ODD = Shape(tokens=5, keys=71, heads=8, kv_heads=2, head_dim=48)


def check(version: Version, shape: Shape = ODD) -> None:
    """Raise AssertionError unless the version computes what tensor/reference.py does; the shape fits no tile."""
    q, k, v, scale = inputs(shape)
    _jit.set_threads(version.threads)
    got = version.function(q, *version.pack(k, v), shape.keys, scale)
    expected = reference.attention(*_arguments(q, *in_pages(k, v), shape.keys, scale)).reshape(q.shape)
    difference = _workshop.error(got, expected)
    assert difference < 1e-5, f"{version.function.__name__} is wrong by {difference:.1e}"


def inputs(shape: Shape) -> tuple[Any, ...]:
    """q (tokens, heads, head_dim), k and v (keys, kv_heads, head_dim), and the scale of the scores."""
    random = np.random.default_rng(0)
    q = random.standard_normal((shape.tokens, shape.heads, shape.head_dim), dtype=np.float32)
    k, v = random.standard_normal((2, shape.keys, shape.kv_heads, shape.head_dim), dtype=np.float32)
    return q, k, v, np.float32(shape.head_dim**-0.5)


def climb(shape: Shape) -> None:
    """Time every version on one shape."""
    tokens, keys, heads, kv_heads, head_dim = shape
    seen = tokens * keys - tokens * (tokens - 1) // 2
    limit = "% of memory" if tokens == 1 else "% of peak"
    title = f"{tokens} queries, {keys} keys, {heads} heads over {kv_heads}, head_dim {head_dim}"
    table = _workshop.Table(title, 2 * seen * heads * head_dim, limit)
    q, k, v, scale = inputs(shape)
    for version in VERSIONS:
        packed = version.pack(k, v)
        caches = _workshop.far_apart(packed) if tokens == 1 else [packed]
        calls = [lambda version=version, each=each: version.function(q, *each, keys, scale) for each in caches]
        seconds = _workshop.shortest(calls, version.threads)
        arithmetic = table.products / _workshop.float_peak() / version.threads
        least = (k.nbytes + v.nbytes) / _workshop.reading_speed() if tokens == 1 else arithmetic
        table.row(_workshop.name(version), seconds, least)


def main() -> None:
    args = arguments()
    for version in VERSIONS:
        check(version)  # also compiles it
    _workshop.describe_machine()
    heads = {"heads": args.heads, "kv_heads": args.kv_heads, "head_dim": args.head_dim}
    given = [Shape(args.tokens, args.keys or args.tokens, **heads)] if args.tokens else []
    for shape in given or [Shape(512, 512, **heads), Shape(1, 4096, **heads)]:
        climb(shape)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time attention from the obvious loops to tinyserve's kernel.")
    parser.add_argument("--tokens", type=int, help="queries; 512, and then one, unless told otherwise")
    parser.add_argument("--keys", type=int, help="with --tokens; at least as many, and as many unless told otherwise")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64, help=f"a multiple of {LANES}")
    args = parser.parse_args()
    too_few = args.tokens and args.keys and args.keys < args.tokens
    if args.head_dim % LANES or args.heads % args.kv_heads or too_few:
        parser.error(f"head_dim is a multiple of {LANES}, heads of kv_heads, and there are no fewer keys than tokens")
    return args


if __name__ == "__main__":
    main()
