"""Every kernel once more in plain NumPy, written to be read: the specification that the fast ones are tested against.

Same names, arguments, and results to rounding. Only tests and scripts/kernels/ call it. mamba2.py and moe.py have
reference_mamba2.py, sampling has reference_sampling.py; gguf_blocks.py is specified by the gguf package.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from tinyserve.tensor import kv_cache
from tinyserve.tensor.attention import CHUNK, SPAN, Scoring
from tinyserve.tensor.matmul import GELU, GELU_TANH, NOTHING, PLAIN, SILU_MUL, Epilogue
from tinyserve.tensor.norm import LAYER, RMS, Norm
from tinyserve.tensor.quant import BLOCK, LARGEST_8, PAIR, PANEL, ZERO_4, ZERO_8, IntegerWeights, Rounding, padded
from tinyserve.tensor.rope import RopeTable

Array = np.ndarray


def to_bfloat16(x: Array) -> Array:
    """Round float32 to bfloat16, ties to even, kept as uint16."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(x: Array) -> Array:
    """The float32 numbers of a bfloat16 array kept as uint16; others pass through."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def unpaired(words: Array, axis: int) -> Array:
    """The bfloat16 numbers, kept as uint16, of words whose two are neighbours along `axis`; others pass through."""
    if words.dtype != np.uint32:
        return words
    halves = np.stack([words & 0xFFFF, words >> 16], axis=axis + 1).astype(np.uint16)
    shape = list(words.shape)
    shape[axis] *= 2
    return halves.reshape(shape)


def rounded_like(kept: Array, x: Array) -> Array:
    """Float32 numbers as they are multiplied with what is kept in this array: rounded where that is bfloat16."""
    return from_bfloat16(to_bfloat16(x)) if kept.dtype == np.uint32 else x


def from_float16(x: Array) -> Array:
    """The float32 numbers of a float16 array kept as int16."""
    return x.view(np.float16).astype(np.float32)


def pack_float(w: Array, bfloat16: bool) -> Array:
    """(N, K) -> (N/32, K, 32): 32 outputs side by side, so that a vector is one input of 16 outputs."""
    N, K = w.shape
    full = np.zeros((padded(N, BLOCK), K), np.float32)
    full[:N] = w
    pairs = np.ascontiguousarray(full.reshape(-1, PAIR, K).transpose(0, 2, 1))
    return to_bfloat16(pairs) if bfloat16 else pairs


def unpack_float(packed: Array, N: int) -> Array:
    """The (N, K) float32 matrix that was packed."""
    pairs, K, _ = packed.shape
    return from_bfloat16(packed).transpose(0, 2, 1).reshape(pairs * PAIR, K)[:N]


def pack_bytes(w: Array, group: int) -> Array:
    """(N, K) -> the stream (N/32, K/group, bytes) of 8-bit weights: scales, then four inputs of an output in turn."""
    N, K = w.shape
    full = np.zeros((padded(N, BLOCK), padded(K, group)), np.float32)
    full[:N, :K] = w
    groups = full.reshape(len(full), -1, group)  # (N, groups, group)
    exact = (np.abs(groups).max(2) / np.float32(LARGEST_8)).astype(np.float32)  # (N, groups)
    half = exact.astype(np.float16)
    scales = np.where(half.astype(np.float32) < exact, np.nextafter(half, np.float16(np.inf)), half)
    wide = scales.astype(np.float32)
    with np.errstate(divide="ignore"):
        inverse = np.where(wide > 0, np.float32(1.0) / wide, np.float32(0.0)).astype(np.float32)
    bytes_ = (np.rint(groups * inverse[:, :, None]) + ZERO_8).astype(np.uint8)
    # (pairs, panels, outputs, groups, loads, inputs) -> (pairs, groups, loads, panels, outputs, inputs)
    fours = bytes_.reshape(-1, 2, PANEL, bytes_.shape[1], group // 4, 4).transpose(0, 3, 4, 1, 2, 5)
    header = scales.reshape(-1, PAIR, scales.shape[1]).transpose(0, 2, 1)
    parts = np.ascontiguousarray(header).view(np.uint8), fours.reshape(*fours.shape[:2], -1)
    return np.concatenate(parts, axis=2).view(np.int8)


def unpack(packed: IntegerWeights, N: int, K: int) -> Array:
    """The (N, K) float32 matrix that integers, scales and minimums stand for."""
    raw = packed.integers.view(np.uint8)  # (pairs, groups, loads, 2, 64)
    if packed.bits == 4:  # two neighbouring fours of inputs in a byte's halves
        fours = np.stack([raw & 15, raw >> 4], axis=3).astype(np.float32) - (0 if packed.has_minimums else ZERO_4)
    else:
        fours = raw[:, :, :, None].astype(np.float32) - ZERO_8
    pairs, groups = fours.shape[:2]
    # (pairs, groups, loads, halves, panels, outputs, inputs) -> (pairs, panels, outputs, groups, loads, halves, inputs)
    fours = fours.reshape(*fours.shape[:5], PANEL, 4).transpose(0, 4, 5, 1, 2, 3, 6)
    integers = fours.reshape(pairs * PAIR, groups, packed.group)

    def of_outputs(halves: Array) -> Array:
        return from_float16(halves).transpose(0, 2, 3, 1).reshape(pairs * PAIR, groups, 1)

    w = integers * of_outputs(packed.scales)
    w = w + of_outputs(packed.minimums) if packed.has_minimums else w
    return w.reshape(pairs * PAIR, -1)[:N, :K]


def quantize_activations(x: Array, group: int, largest: float | np.floating) -> Array:
    """x (M, K) as integers up to `largest` times a scale a group: what quantized products really multiply."""
    M, K = x.shape
    full = np.zeros((M, padded(K, group)), np.float32)
    full[:, :K] = x
    groups = full.reshape(M, -1, group)
    scales = np.abs(groups).max(2, keepdims=True) / np.float32(largest)
    integers = np.rint(groups / np.where(scales > 0, scales, 1))
    return (integers * scales).reshape(M, -1)[:, :K]


def take_rows_float(packed: Array, ids: Array, K: int) -> Array:
    return unpack_float(packed, len(packed) * PAIR)[ids]


def take_rows_integer(packed: IntegerWeights, ids: Array, K: int) -> Array:
    return unpack(packed, len(packed.stream) * PAIR, K)[ids]


def matmul_float(x: Array, norm: Norm, w: Array, after: Epilogue, residual: Array, width: int) -> Array:
    h = norm_rows(x, norm)
    return _finish(h.astype(np.float64) @ unpack_float(w, len(w) * PAIR).T, width, after, residual)


def matmul_integer(
    x: Array, norm: Norm, rounding: Rounding, w: IntegerWeights, after: Epilogue, residual: Array, width: int
) -> Array:
    quantized = quantize_activations(norm_rows(x, norm), w.group, rounding.numbers.largest).astype(np.float64)
    return _finish(quantized @ unpack(w, len(w.stream) * PAIR, x.shape[1]).T, width, after, residual)


def grouped_matmul_float(x: Array, norm: Norm, offsets: Array, w: Array, after: Epilogue, width: int) -> Array:
    y = np.empty((len(x), width), np.float32)
    for mine, of_expert in _experts(offsets, w):
        y[mine] = matmul_float(x[mine], norm, of_expert, after, NOTHING, width)
    return y


def grouped_matmul_integer(
    x: Array, norm: Norm, rounding: Rounding, offsets: Array, w: IntegerWeights, after: Epilogue, width: int
) -> Array:
    y = np.empty((len(x), width), np.float32)
    for mine, of_expert in _experts(offsets, w.stream):
        y[mine] = matmul_integer(x[mine], norm, rounding, w._replace(stream=of_expert), after, NOTHING, width)
    return y


def _experts(offsets: Array, packed: Array) -> Iterator[tuple[slice, Array]]:
    """The rows of each expert that has any, and its part of the packed weights."""
    for (first, last), part in zip(pairwise(offsets), np.split(packed, len(offsets) - 1), strict=True):
        if first < last:
            yield slice(first, last), part


def _finish(product: Array, width: int, after: Epilogue, residual: Array) -> Array:
    """product (M, packed outputs) float64 -> activation(scale · (product + bias)) + residual (M, width) float32."""
    bias = after.bias
    if bias.size:
        product = product[:, : len(bias)] + bias
    product = product * after.scale
    if after.activation == SILU_MUL:
        panels = -(-width // PANEL)
        gate, up = product[:, : 2 * panels * PANEL].reshape(len(product), panels, 2, PANEL).transpose(2, 0, 1, 3)
        product = silu(gate.reshape(len(product), -1)) * up.reshape(len(product), -1)
    activate = {PLAIN: lambda v: v, SILU_MUL: lambda v: v, GELU: gelu, GELU_TANH: gelu_tanh}[after.activation]
    y = activate(product[:, :width])
    return (y + residual if residual.size else y).astype(np.float32)


def norm_rows(x: Array, norm: Norm) -> Array:
    if norm.kind == RMS:
        return rms_norm(x, norm.weight, norm.eps)
    return layer_norm(x, norm.weight, norm.bias, norm.eps) if norm.kind == LAYER else x


def rms_norm(x: Array, weight: Array, eps: float | np.floating) -> Array:
    return weight * x / np.sqrt(np.mean(np.square(x), axis=1, keepdims=True) + np.float32(eps))


def rms_norm_heads(qkv: Array, heads: int, kv_heads: int, q_weight: Array, k_weight: Array, eps: np.float32) -> None:
    parts = qkv.reshape(len(qkv), heads + 2 * kv_heads, len(q_weight))  # (tokens, heads, head_dim)
    for part, weight in ((parts[:, :heads], q_weight), (parts[:, heads : heads + kv_heads], k_weight)):
        part[:] = weight * part / np.sqrt(np.mean(np.square(part), axis=2, keepdims=True) + np.float32(eps))


def layer_norm(x: Array, weight: Array, bias: Array, eps: float | np.floating) -> Array:
    centred = x - x.mean(axis=1, keepdims=True)
    return weight * centred / np.sqrt(np.mean(np.square(centred), axis=1, keepdims=True) + np.float32(eps)) + bias


def silu(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def apply_rope(x: Array, cosines: Array, sines: Array, positions: Array, heads: int, head_dim: int) -> None:
    view = x[:, : heads * head_dim].reshape(len(x), heads, 2, head_dim // 2)
    first, second = view[:, :, 0].copy(), view[:, :, 1].copy()  # (tokens, heads, head_dim/2)
    cosine, sine = cosines[positions][:, None], sines[positions][:, None]
    x[:, : heads * head_dim] = np.stack(
        [first * cosine - second * sine, second * cosine + first * sine], axis=2
    ).reshape(len(x), -1)


def rotate_and_store(
    qkv: Array, heads: kv_cache.Heads, rope_table: RopeTable, tokens: kv_cache.Tokens, pages: kv_cache.Pages
) -> None:
    queries, kv_heads, head_dim = heads
    keys, values, key_scales, value_scales = pages
    if rope_table.cosines.size:
        apply_rope(qkv, rope_table.cosines, rope_table.sines, tokens.positions, queries + kv_heads, head_dim)
    parts = qkv.reshape(len(qkv), queries + 2 * kv_heads, head_dim)
    k, v = parts[:, queries : queries + kv_heads], parts[:, queries + kv_heads :]  # (tokens, kv_heads, head_dim)
    block, offset = np.divmod(tokens.slot_mapping, keys.shape[3])
    if key_scales.size:
        for scales, x in ((key_scales, k), (value_scales, v)):
            scales[block, :, offset] = np.abs(x).max(2) / kv_cache.LARGEST
        k = np.rint(k / key_scales[block, :, offset][:, :, None])
        v = np.rint(v / value_scales[block, :, offset][:, :, None])
    if keys.dtype != np.uint32:
        keys[block, :, :, offset] = k
        values[block, :, offset, :head_dim] = v
        return
    # uint16 as they lie in memory: (.., block_size, pair) of keys, and (.., head_dim, pair) of values.
    key_halves = keys.view(np.uint16).reshape(*keys.shape, 2)
    for d in range(head_dim):
        key_halves[block, :, d // 2, offset, d % 2] = to_bfloat16(k[:, :, d])
    value_halves = values.view(np.uint16).reshape(*values.shape, 2)
    value_halves[block, :, offset // 2, :head_dim, offset % 2] = to_bfloat16(v)


def softmax_weights(keys: Array, scores: Array, where: Array) -> Array:
    """exp(score - largest); beside keys in bfloat16 rounded where the kernel does: beside the largest score so far of a
    span's chunks.
    """
    largest = scores.max()
    if keys.dtype != np.uint32:
        return np.exp(scores - largest)
    shift = np.empty_like(scores)
    for span in np.unique(where // SPAN):
        so_far = -np.inf
        for chunk in np.unique(where[where // SPAN == span] // CHUNK):
            so_far = max(so_far, scores[where // CHUNK == chunk].max())
            shift[where // CHUNK == chunk] = so_far
    return rounded_like(keys, np.exp(scores - shift)) * np.exp(shift - largest)


def attention(
    qkv: Array, heads: kv_cache.Heads, scoring: Scoring, tokens: kv_cache.Tokens, pages: kv_cache.Pages
) -> Array:
    (count, kv_heads, head_dim), (scale, window, alibi) = heads, scoring
    keys, values, key_scales, value_scales = pages
    block_size = keys.shape[3]
    out = np.empty((len(qkv), count, head_dim), np.float32)
    queries = rounded_like(keys, qkv[:, : count * head_dim].reshape(len(qkv), count, head_dim))
    every_key = from_bfloat16(unpaired(keys, 2))[:, :, :head_dim]
    every_value = from_bfloat16(unpaired(values, 2))[..., :head_dim]
    for m, position in enumerate(tokens.positions):
        first = max(0, position - window + 1) if window > 0 else 0
        where = np.arange(first, position + 1)
        block, offset = tokens.block_tables[tokens.sequence_of[m]][where // block_size], where % block_size
        k = every_key[block, :, :, offset].astype(np.float64)  # (keys, kv_heads, head_dim)
        v = every_value[block, :, offset].astype(np.float64)
        if key_scales.size:
            k, v = k * key_scales[block, :, offset][:, :, None], v * value_scales[block, :, offset][:, :, None]
        for head in range(count):
            scores = k[:, head * kv_heads // count] @ queries[m, head]
            scores = (scores + alibi[head, where] if alibi.size else scores) * scale
            weights = softmax_weights(keys, scores, where)
            out[m, head] = weights @ v[:, head * kv_heads // count] / weights.sum()
    return out.reshape(len(qkv), -1)
