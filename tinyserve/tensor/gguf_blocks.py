"""GGUF's simple blocks of 32 weights, widened to float32: Q8_0, and the 4- and 5-bit ones.

The layouts are ggml's (`block_q4_0` and so on in ggml-common.h). Larger blocks ("K") are left to the gguf package.
"""

import numpy as np
from numba import prange

from tinyserve.tensor._jit import parallel_kernel

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
