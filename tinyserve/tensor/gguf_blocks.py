"""GGUF's simple blocks of 32 weights: widened to float32 (Q8_0, and the 4- and 5-bit ones), or repacked as they are.

The layouts are ggml's (`block_q4_0` and so on in ggml-common.h). Larger blocks ("K") are left to the gguf package.
"""

from dataclasses import dataclass

import numpy as np

from tinyserve.tensor._jit import kernel
from tinyserve.tensor.program import instruction
from tinyserve.tensor.quant import PAIR, PANEL, ZERO_8, IntegerWeights
from tinyserve.tensor.thread_pool import own_items

# Where in a block's bytes the fifth bits and the nibbles begin, after one or two float16: scale and minimum.
_LAYOUT = {"Q4_0": (0, 2), "Q4_1": (0, 4), "Q5_0": (2, 6), "Q5_1": (4, 8)}
FAST = ("Q8_0", *_LAYOUT)


def dequantize(raw: np.ndarray, quantization: str) -> np.ndarray:
    """raw (blocks, bytes a block) uint8 of one of `FAST` -> (blocks, 32) float32."""
    raw = np.ascontiguousarray(raw)
    scale = np.ascontiguousarray(raw[:, :2]).view(np.float16).astype(np.float32).ravel()
    out = np.empty((len(raw), 32), np.float32)
    if quantization == "Q8_0":
        _dequantize_8(raw, scale, out)
        return out
    high, low = _LAYOUT[quantization]
    if quantization.endswith("_1"):
        minimum = np.ascontiguousarray(raw[:, 2:4]).view(np.float16).astype(np.float32).ravel()
    else:
        minimum = scale * np.float32(-16 if high else -8)
    _dequantize_nibbles(raw, scale, minimum, high, low, out)
    return out


@instruction
def _dequantize_8(team, raw, scale, out):
    first, last = own_items(team, len(raw))
    for b in range(first, last):
        for i in range(32):
            out[b, i] = np.float32(np.int8(raw[b, 2 + i])) * scale[b]


@instruction
def _dequantize_nibbles(team, raw, scale, minimum, high, low, out):
    """Byte i of a block's 16 holds weight i below and weight i + 16 above; `high` is where 32 fifth bits are, or 0."""
    first_block, last_block = own_items(team, len(raw))
    for b in range(first_block, last_block):
        for i in range(16):
            first, second = np.int32(raw[b, low + i] & 15), np.int32(raw[b, low + i] >> 4)
            if high > 0:
                first |= np.int32((raw[b, high + i // 8] >> (i % 8)) & 1) << 4
                second |= np.int32((raw[b, high + 2 + i // 8] >> (i % 8)) & 1) << 4
            out[b, i] = np.float32(first) * scale[b] + minimum[b]
            out[b, i + 16] = np.float32(second) * scale[b] + minimum[b]


@dataclass(frozen=True)
class Blocks:
    """A matrix as GGUF keeps it: of each row the bytes of its blocks, `raw` (rows, bytes) uint8."""

    quantization: str
    raw: np.ndarray
    shape: tuple[int, int]


# What repacking keeps bit for bit: bits of a weight, and how many bytes a block of 32 has.
_REPACKED = {"Q8_0": (8, 34), "Q4_0": (4, 18), "Q4_1": (4, 20)}


def repack(blocks: Blocks, most_bits: int) -> IntegerWeights | None:
    """The same integers, scales and minimums as matmul.py reads them; None where it would take more bits or a loss."""
    bits, size = _REPACKED.get(blocks.quantization, (32, 0))
    N, K = blocks.shape
    if bits > most_bits or K % 32:
        return None
    raw = np.ascontiguousarray(blocks.raw).reshape(N, K // 32, size)
    packed = IntegerWeights.empty(blocks.shape, bits, 32, blocks.quantization == "Q4_1")
    (_repack_bytes if bits == 8 else _repack_nibbles)(raw, packed)
    return packed


@instruction
def _repack_bytes(team, raw, packed):
    first, last = own_items(team, packed.stream.shape[0])
    for pair in range(first, last):
        for lane in range(PAIR):
            n = pair * PAIR + lane
            for g in range(packed.stream.shape[1]):
                out = packed.stream[pair, g]
                _copy_half(raw, n, g, 0, out, 2 * lane)
                at = 2 * PAIR + lane // PANEL * 4 * PANEL + lane % PANEL * 4
                for i in range(32):
                    byte = np.int32(np.int8(raw[n, g, 2 + i])) if n < raw.shape[0] else np.int32(0)
                    out[at + i // 4 * 4 * PAIR + i % 4] = np.int8(byte + ZERO_8)


@kernel
def _copy_half(raw, n, g, source, out, target):
    """Two bytes of a block to two of a stream; zeros past the last output."""
    for i in range(2):
        out[target + i] = raw[n, g, source + i] if n < raw.shape[0] else np.uint8(0)


@instruction
def _repack_nibbles(team, raw, packed):
    low = raw.shape[2] - 16
    header = (1 + packed.has_minimums) * 2 * PAIR
    first, last = own_items(team, packed.stream.shape[0])
    for pair in range(first, last):
        for lane in range(PAIR):
            n = pair * PAIR + lane
            for g in range(packed.stream.shape[1]):
                out = packed.stream[pair, g]
                _copy_half(raw, n, g, 0, out, 2 * lane)
                if packed.has_minimums:
                    _copy_half(raw, n, g, 2, out, 2 * PAIR + 2 * lane)
                at = header + lane // PANEL * 4 * PANEL + lane % PANEL * 4
                # ggml's byte i holds weights i and i + 16; ours hold neighbouring fours.
                for k in range(2):
                    for i in range(4):
                        first_byte = second_byte = np.uint8(0)
                        if n < raw.shape[0]:
                            first_byte, second_byte = raw[n, g, low + 8 * k + i], raw[n, g, low + 8 * k + 4 + i]
                        out[at + k * 4 * PAIR + i] = first_byte & 15 | (second_byte & 15) << 4
                        out[at + (2 + k) * 4 * PAIR + i] = first_byte >> 4 | second_byte & 240
