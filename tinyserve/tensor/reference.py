"""Every kernel once more in plain NumPy, written to be read: the specification that the fast ones are tested against.

Same names, same arguments, same results to rounding. Nothing here is fast, and nothing but tests calls it. (What
gguf_blocks.py does is specified by the gguf package.)
"""

import math

import numpy as np

from tinyserve.tensor.quant import BLOCK, LARGEST_8, LARGEST_16, PANEL, padded

Array = np.ndarray


def to_bfloat16(x: Array) -> Array:
    """Round float32 to bfloat16, ties to even, kept as uint16."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(x: Array) -> Array:
    """The float32 numbers of a bfloat16 array kept as uint16; float32 passes through."""
    return x if x.dtype == np.float32 else (x.astype(np.uint32) << 16).view(np.float32)


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


def pack_int8(w: Array, group: int) -> tuple[Array, Array]:
    """(N, K) -> unsigned bytes (N/16, K/4, 16·4) and scales (N/16, K/group, 16); w = scale · (byte - 128)."""
    N, K = w.shape
    full = np.zeros((padded(N, BLOCK), padded(K, group)), np.float32)
    full[:N, :K] = w
    groups = full.reshape(len(full), -1, group)  # (N, groups, group)
    scales = (np.abs(groups).max(2) / np.float32(LARGEST_8)).astype(np.float32)  # (N, groups)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales > 0, np.float32(1.0) / scales, np.float32(0.0)).astype(np.float32)
    bytes_ = (np.rint(groups * inverse[:, :, None]) + 128).astype(np.uint8).reshape(full.shape)
    packed = (
        bytes_.reshape(-1, PANEL, full.shape[1] // 4, 4)
        .transpose(0, 2, 1, 3)
        .reshape(-1, full.shape[1] // 4, 4 * PANEL)
    )
    return (
        np.ascontiguousarray(packed).view(np.int8),
        np.ascontiguousarray(scales.reshape(-1, PANEL, scales.shape[1]).transpose(0, 2, 1)),
    )


def unpack_int8(packed: Array, scales: Array, N: int, K: int) -> Array:
    """The (N, K) float32 matrix that the bytes and scales stand for."""
    panels, fours, _ = packed.shape
    integers = packed.view(np.uint8).astype(np.float32) - 128
    integers = integers.reshape(panels, fours, PANEL, 4).transpose(0, 2, 1, 3).reshape(panels * PANEL, 4 * fours)
    group = 4 * fours // scales.shape[1]
    wide = np.repeat(scales.transpose(0, 2, 1).reshape(panels * PANEL, -1), group, axis=1)
    return (integers * wide)[:N, :K]


def quantize_16(x: Array, group: int) -> Array:
    """x (M, K) as 16-bit integers times a scale a group: what the activations of "w8a16" really are."""
    M, K = x.shape
    full = np.zeros((M, padded(K, group)), np.float32)
    full[:, :K] = x
    groups = full.reshape(M, -1, group)
    scales = np.abs(groups).max(2, keepdims=True) / np.float32(LARGEST_16)
    integers = np.rint(groups / np.where(scales > 0, scales, 1))
    return (integers * scales).reshape(M, -1)[:, :K]


def take_rows_float(packed: Array, ids: Array, K: int) -> Array:
    return unpack_float(packed, len(packed) * PANEL)[ids]


def take_rows_int8(packed: Array, scales: Array, ids: Array, K: int) -> Array:
    return unpack_int8(packed, scales, len(packed) * PANEL, K)[ids]


def matmul_float(x: Array, w: Array, bias: Array, N: int) -> Array:
    y = x.astype(np.float64) @ unpack_float(w, N).T.astype(np.float64)
    return (y + bias if bias.size else y).astype(np.float32)


def matmul_int8(x: Array, w: Array, w_scales: Array, bias: Array, N: int) -> Array:
    quantized = quantize_16(x, 4 * w.shape[1] // w_scales.shape[1]).astype(np.float64)
    y = quantized @ unpack_int8(w, w_scales, N, x.shape[1]).T.astype(np.float64)
    return (y + bias if bias.size else y).astype(np.float32)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt(np.mean(np.square(x), axis=1, keepdims=True) + np.float32(eps))


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(axis=1, keepdims=True)
    return weight * centred / np.sqrt(np.mean(np.square(centred), axis=1, keepdims=True) + np.float32(eps)) + bias


def silu_mul(x: Array) -> Array:
    gate, up = np.split(x, 2, axis=1)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up


def gelu_tanh(x: Array) -> Array:
    return (0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))).astype(np.float32)


def gelu(x: Array) -> Array:
    return (0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))).astype(np.float32)


def apply_rope(x: Array, cosines: Array, sines: Array, positions: Array, heads: int, head_dim: int) -> None:
    view = x[:, : heads * head_dim].reshape(len(x), heads, 2, head_dim // 2)
    first, second = view[:, :, 0].copy(), view[:, :, 1].copy()  # (tokens, heads, head_dim/2)
    cosine, sine = cosines[positions][:, None], sines[positions][:, None]
    x[:, : heads * head_dim] = np.stack(
        [first * cosine - second * sine, second * cosine + first * sine], axis=2
    ).reshape(len(x), -1)


def store_kv(qkv: Array, heads: int, kv_heads: int, head_dim: int, slots: Array, keys: Array, values: Array) -> None:
    parts = qkv.reshape(len(qkv), heads + 2 * kv_heads, head_dim)
    block, offset = np.divmod(slots, keys.shape[3])
    keys[block, :, :, offset] = parts[:, heads : heads + kv_heads]
    values[block, :, offset, :head_dim] = parts[:, heads + kv_heads :]


def attention(
    qkv: Array, heads: int, keys: Array, values: Array, block_tables: Array, sequence_of: Array, positions: Array,
    scale: float, window: int,
) -> Array:  # fmt: skip
    kv_heads, head_dim, block_size = keys.shape[1:]
    out = np.empty((len(qkv), heads, head_dim), np.float32)
    queries = qkv[:, : heads * head_dim].reshape(len(qkv), heads, head_dim)
    for m, position in enumerate(positions):
        first = max(0, position - window + 1) if window > 0 else 0
        where = np.arange(first, position + 1)
        block, offset = block_tables[sequence_of[m]][where // block_size], where % block_size
        k = keys[block, :, :, offset].astype(np.float64)  # (keys, kv_heads, head_dim)
        v = values[block, :, offset, :head_dim].astype(np.float64)
        for head in range(heads):
            scores = k[:, head * kv_heads // heads] @ queries[m, head] * scale
            weights = np.exp(scores - scores.max())
            out[m, head] = weights @ v[:, head * kv_heads // heads] / weights.sum()
    return out.reshape(len(qkv), -1)
