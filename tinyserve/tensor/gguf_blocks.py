"""GGUF's simple blocks of 32 weights: widened to float32 (Q8_0, and the 4- and 5-bit ones), or repacked as they are.

The layouts are ggml's (`block_q4_0` and so on in ggml-common.h). Larger blocks ("K") are left to the gguf package.
"""

from dataclasses import dataclass

import numpy as np
from numba import prange

from tinyserve.tensor._jit import kernel, parallel_kernel
from tinyserve.tensor.quant import BLOCK, NO_MINIMUMS, PANEL, ZERO_8, Packed, padded

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


@parallel_kernel
def _dequantize_8(raw, scale, out):
    for b in prange(len(raw)):
        for i in range(32):
            out[b, i] = np.float32(np.int8(raw[b, 2 + i])) * scale[b]


@parallel_kernel
def _dequantize_nibbles(raw, scale, minimum, high, low, out):
    """Byte i of a block's 16 holds weight i below and weight i + 16 above; `high` is where 32 fifth bits are, or 0."""
    for b in prange(len(raw)):
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


def repack(blocks: Blocks, most_bits: int) -> Packed | None:
    """The same integers, scales and minimums as matmul.py reads them; None where it would take more bits or a loss."""
    bits, size = _REPACKED.get(blocks.quantization, (32, 0))
    N, K = blocks.shape
    if bits > most_bits or K % 32:
        return None
    panels, groups = padded(N, BLOCK) // PANEL, K // 32
    raw = blocks.raw.reshape(N, groups, size)
    raw.flags.writeable = False  # as a mapped file's are: one compiled kernel, not two
    scales = np.empty((panels, groups, PANEL), np.int16)
    minimums = np.empty(scales.shape if blocks.quantization == "Q4_1" else NO_MINIMUMS.shape, np.int16)
    if bits == 8:
        integers = np.empty((panels, K // 4, 4 * PANEL), np.int8)
        _repack_bytes(raw, integers, scales)
    else:
        integers = np.empty((panels, K // 8, 4 * PANEL), np.uint8)
        _repack_nibbles(raw, integers, scales, minimums)
    return Packed(integers, scales, minimums)


@kernel
def _half(block, at):
    """The bits of a block's float16 at this byte."""
    return np.int16(block[at]) | np.int16(block[at + 1]) << 8


@kernel
def _repack_panel_of_bytes(raw, integers, scales, p):
    for lane in range(PANEL):
        row = p * PANEL + lane
        for g in range(raw.shape[1]):
            inside = row < len(raw)
            scales[p, g, lane] = _half(raw[row, g], 0) if inside else np.int16(0)
            for k in range(8):
                for i in range(4):
                    byte = np.int32(np.int8(raw[row, g, 2 + 4 * k + i])) if inside else np.int32(0)
                    integers[p, g * 8 + k, lane * 4 + i] = np.int8(byte + ZERO_8)


@parallel_kernel
def _repack_bytes(raw, integers, scales):
    for p in prange(len(integers)):
        _repack_panel_of_bytes(raw, integers, scales, np.int64(p))


@kernel
def _repack_panel_of_nibbles(raw, integers, scales, minimums, p):
    low = raw.shape[2] - 16
    for lane in range(PANEL):
        row = p * PANEL + lane
        for g in range(raw.shape[1]):
            if row >= len(raw):
                scales[p, g, lane] = 0
                if minimums.size:
                    minimums[p, g, lane] = 0
                integers[p, g * 4 : g * 4 + 4, lane * 4 : lane * 4 + 4] = 0
                continue
            block = raw[row, g]
            scales[p, g, lane] = _half(block, 0)
            if minimums.size:
                minimums[p, g, lane] = _half(block, 2)
            # ggml's byte i holds weights i and i + 16; ours hold neighbouring fours.
            for k in range(2):
                for i in range(4):
                    first, second = block[low + 8 * k + i], block[low + 8 * k + 4 + i]
                    integers[p, g * 4 + k, lane * 4 + i] = first & 15 | (second & 15) << 4
                    integers[p, g * 4 + 2 + k, lane * 4 + i] = first >> 4 | second & 240


@parallel_kernel
def _repack_nibbles(raw, integers, scales, minimums):
    for p in prange(len(integers)):
        _repack_panel_of_nibbles(raw, integers, scales, minimums, np.int64(p))
