"""Every kernel once more in plain NumPy, written to be read: the specification that the fast ones are tested against.

Same names, arguments, and results to rounding. Only tests and scripts/kernels/ call it. mamba2.py and moe.py have
reference_mamba2.py, sampling has reference_sampling.py; gguf_blocks.py is specified by the gguf package.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from tinyserve.tensor import kv_cache
from tinyserve.tensor.matmul import GELU, GELU_TANH, PLAIN, SILU_MUL
from tinyserve.tensor.norm import LAYER, RMS
from tinyserve.tensor.quant import BLOCK, LARGEST_8, PANEL, ZERO_4, ZERO_8, padded

Array = np.ndarray


def to_bfloat16(x: Array) -> Array:
    """Round float32 to bfloat16, ties to even, kept as uint16."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(x: Array) -> Array:
    """The float32 numbers of a bfloat16 array kept as uint16; others pass through."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def from_float16(x: Array) -> Array:
    """The float32 numbers of a float16 array kept as int16."""
    return x.view(np.float16).astype(np.float32)


def pack_float(w: Array, bfloat16: bool) -> Array:
    """(N, K) -> (N/16, K, 16): 16 outputs side by side, so that one vector is one input of 16 outputs."""
    N, K = w.shape
    full = np.zeros((padded(N, BLOCK), K), np.float32)
    full[:N] = w
    panels = np.ascontiguousarray(full.reshape(-1, PANEL, K).transpose(0, 2, 1))
    return to_bfloat16(panels) if bfloat16 else panels


def unpack_float(packed: Array, N: int) -> Array:
    """The (N, K) float32 matrix that was packed."""
    panels, K, _ = packed.shape
    return from_bfloat16(packed).transpose(0, 2, 1).reshape(panels * PANEL, K)[:N]


def pack_bytes(w: Array, group: int) -> tuple[Array, Array]:
    """(N, K) -> unsigned bytes (N/16, K/4, 16·4) and float16 scales (N/16, K/group, 16); w = scale · (byte - 128)."""
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
    bytes_ = (np.rint(groups * inverse[:, :, None]) + ZERO_8).astype(np.uint8).reshape(full.shape)
    fours = bytes_.reshape(-1, PANEL, full.shape[1] // 4, 4).transpose(0, 2, 1, 3)
    return (
        np.ascontiguousarray(fours.reshape(-1, full.shape[1] // 4, 4 * PANEL)).view(np.int8),
        np.ascontiguousarray(scales.reshape(-1, PANEL, scales.shape[1]).transpose(0, 2, 1)).view(np.int16),
    )


def unpack(packed: Array, scales: Array, minimums: Array, N: int, K: int) -> Array:
    """The (N, K) float32 matrix that the bytes or nibbles, scales and minimums stand for."""
    raw = packed.view(np.uint8)
    if packed.dtype == np.uint8:  # two neighbouring fours of inputs in a byte's halves
        fours = np.stack([raw & 15, raw >> 4], axis=2).reshape(len(raw), -1, 4 * PANEL).astype(np.float32)
        fours -= 0 if minimums.size else ZERO_4
    else:
        fours = raw.astype(np.float32) - ZERO_8
    panels, count, _ = fours.shape
    integers = fours.reshape(panels, count, PANEL, 4).transpose(0, 2, 1, 3).reshape(panels * PANEL, 4 * count)
    group = 4 * count // scales.shape[1]

    def widened(halves: Array) -> Array:
        return np.repeat(from_float16(halves).transpose(0, 2, 1).reshape(panels * PANEL, -1), group, axis=1)

    w = integers * widened(scales)
    return (w + widened(minimums) if minimums.size else w)[:N, :K]


def quantize_activations(x: Array, group: int, largest: float) -> Array:
    """x (M, K) as integers up to `largest` times a scale a group: what quantized products really multiply."""
    M, K = x.shape
    full = np.zeros((M, padded(K, group)), np.float32)
    full[:, :K] = x
    groups = full.reshape(M, -1, group)
    scales = np.abs(groups).max(2, keepdims=True) / np.float32(largest)
    integers = np.rint(groups / np.where(scales > 0, scales, 1))
    return (integers * scales).reshape(M, -1)[:, :K]


def take_rows_float(packed: Array, ids: Array, K: int) -> Array:
    return unpack_float(packed, len(packed) * PANEL)[ids]


def take_rows_integer(packed: Array, scales: Array, minimums: Array, ids: Array, K: int) -> Array:
    return unpack(packed, scales, minimums, len(packed) * PANEL, K)[ids]


def matmul_float(
    x: Array, norm: int, norm_weight: Array, norm_bias: Array, eps: float, w: Array, width: int, bias: Array,
    scale: float, activation: int, residual: Array,
) -> Array:  # fmt: skip
    h = norm_rows(x, norm, norm_weight, norm_bias, eps)
    return _finish(h.astype(np.float64) @ unpack_float(w, len(w) * PANEL).T, width, bias, scale, activation, residual)


def matmul_integer(
    x: Array, norm: int, norm_weight: Array, norm_bias: Array, eps: float, kind: Array, largest: float, zero: int,
    w: Array, w_scales: Array, minimums: Array, width: int, bias: Array, scale: float, activation: int, residual: Array,
) -> Array:  # fmt: skip
    h = norm_rows(x, norm, norm_weight, norm_bias, eps)
    group = (4 if w.dtype == np.int8 else 8) * w.shape[1] // w_scales.shape[1]
    quantized = quantize_activations(h, group, largest).astype(np.float64)
    weights = unpack(w, w_scales, minimums, len(w) * PANEL, x.shape[1])
    return _finish(quantized @ weights.T, width, bias, scale, activation, residual)


def grouped_matmul_float(
    x: Array, norm: int, norm_weight: Array, norm_bias: Array, eps: float, offsets: Array, w: Array, width: int,
    scale: float, activation: int,
) -> Array:  # fmt: skip
    y = np.empty((len(x), width), np.float32)
    after = width, np.empty(0), scale, activation, np.empty(0)
    for mine, (w_of_expert,) in _experts(offsets, w):
        y[mine] = matmul_float(x[mine], norm, norm_weight, norm_bias, eps, w_of_expert, *after)
    return y


def grouped_matmul_integer(
    x: Array, norm: int, norm_weight: Array, norm_bias: Array, eps: float, kind: Array, largest: float, zero: int,
    offsets: Array, w: Array, w_scales: Array, minimums: Array, width: int, scale: float, activation: int,
) -> Array:  # fmt: skip
    y = np.empty((len(x), width), np.float32)
    before = norm, norm_weight, norm_bias, eps, kind, largest, zero
    after = width, np.empty(0), scale, activation, np.empty(0)
    for mine, (integers, scales, least) in _experts(offsets, w, w_scales, minimums):
        y[mine] = matmul_integer(x[mine], *before, integers, scales, least, *after)
    return y


def _experts(offsets: Array, *arrays: Array) -> Iterator[tuple[slice, list[Array]]]:
    """The rows of each expert that has any, and its part of each array."""
    parts = zip(*(np.split(array, len(offsets) - 1) for array in arrays), strict=True)
    for (first, last), part in zip(pairwise(offsets), parts, strict=True):
        if first < last:
            yield slice(first, last), list(part)


def _finish(product: Array, width: int, bias: Array, scale: float, activation: int, residual: Array) -> Array:
    """product (M, packed outputs) float64 -> activation(scale · (product + bias)) + residual (M, width) float32."""
    if bias.size:
        product = product[:, : len(bias)] + bias
    product = product * scale
    if activation == SILU_MUL:
        panels = -(-width // PANEL)
        gate, up = product[:, : 2 * panels * PANEL].reshape(len(product), panels, 2, PANEL).transpose(2, 0, 1, 3)
        product = silu(gate.reshape(len(product), -1)) * up.reshape(len(product), -1)
    y = {PLAIN: lambda v: v, SILU_MUL: lambda v: v, GELU: gelu, GELU_TANH: gelu_tanh}[activation](product[:, :width])
    return (y + residual if residual.size else y).astype(np.float32)


def norm_rows(x: Array, norm: int, weight: Array, bias: Array, eps: float) -> Array:
    """x (M, K), behind no norm, RMSNorm or LayerNorm."""
    if norm == RMS:
        return rms_norm(x, weight, eps)
    return layer_norm(x, weight, bias, eps) if norm == LAYER else x


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt(np.mean(np.square(x), axis=1, keepdims=True) + np.float32(eps))


def rms_norm_heads(qkv: Array, heads: int, kv_heads: int, q_weight: Array, k_weight: Array, eps: float) -> None:
    parts = qkv.reshape(len(qkv), heads + 2 * kv_heads, len(q_weight))  # (tokens, heads, head_dim)
    for part, weight in ((parts[:, :heads], q_weight), (parts[:, heads : heads + kv_heads], k_weight)):
        part[:] = weight * part / np.sqrt(np.mean(np.square(part), axis=2, keepdims=True) + np.float32(eps))


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
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
    qkv: Array, cosines: Array, sines: Array, positions: Array, heads: int, kv_heads: int, head_dim: int, slots: Array,
    keys: Array, values: Array, key_scales: Array, value_scales: Array,
) -> None:  # fmt: skip
    if cosines.size:
        apply_rope(qkv, cosines, sines, positions, heads + kv_heads, head_dim)
    parts = qkv.reshape(len(qkv), heads + 2 * kv_heads, head_dim)
    k, v = parts[:, heads : heads + kv_heads], parts[:, heads + kv_heads :]  # (tokens, kv_heads, head_dim)
    block, offset = np.divmod(slots, keys.shape[3])
    if key_scales.size:
        for scales, x in ((key_scales, k), (value_scales, v)):
            scales[block, :, offset] = np.abs(x).max(2) / kv_cache.LARGEST
        k = np.rint(k / key_scales[block, :, offset][:, :, None])
        v = np.rint(v / value_scales[block, :, offset][:, :, None])
    kept = to_bfloat16 if keys.dtype == np.uint16 else lambda x: x
    keys[block, :, :, offset] = kept(k)
    values[block, :, offset, :head_dim] = kept(v)


def attention(
    qkv: Array, heads: int, keys: Array, values: Array, key_scales: Array, value_scales: Array, block_tables: Array,
    sequence_of: Array, positions: Array, scale: float, window: int, alibi: Array,
) -> Array:  # fmt: skip
    kv_heads, head_dim, block_size = keys.shape[1:]
    out = np.empty((len(qkv), heads, head_dim), np.float32)
    queries = qkv[:, : heads * head_dim].reshape(len(qkv), heads, head_dim)
    for m, position in enumerate(positions):
        first = max(0, position - window + 1) if window > 0 else 0
        where = np.arange(first, position + 1)
        block, offset = block_tables[sequence_of[m]][where // block_size], where % block_size
        k = from_bfloat16(keys)[block, :, :, offset].astype(np.float64)  # (keys, kv_heads, head_dim)
        v = from_bfloat16(values)[block, :, offset, :head_dim].astype(np.float64)
        if key_scales.size:
            k, v = k * key_scales[block, :, offset][:, :, None], v * value_scales[block, :, offset][:, :, None]
        for head in range(heads):
            scores = k[:, head * kv_heads // heads] @ queries[m, head]
            scores = (scores + alibi[head, where] if alibi.size else scores) * scale
            weights = np.exp(scores - scores.max())
            out[m, head] = weights @ v[:, head * kv_heads // heads] / weights.sum()
    return out.reshape(len(qkv), -1)
