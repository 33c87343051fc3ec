"""The key and value cache: pages of memory, one array of each kind a layer.

Knows what a block costs; which block belongs to whom is told by block tables, made of ints, above.
"""

from typing import NamedTuple

import numpy as np

from tinyserve.config import ModelConfig
from tinyserve.errors import UserError
from tinyserve.tensor.quant import padded
from tinyserve.tensor.simd import LANES

Array = np.ndarray

KV_DTYPES = ("float32", "bfloat16", "int8")
_KEPT_AS = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}


class LayerCache(NamedTuple):
    """One layer's pages; the scales are empty unless keys and values are int8."""

    keys: Array  # (blocks, kv_heads, head_dim, block_size)
    values: Array  # (blocks, kv_heads, block_size, padded head_dim)
    key_scales: Array  # (blocks, kv_heads, block_size) float32
    value_scales: Array


class KVCache:
    """`num_blocks` blocks of `block_size` tokens for every layer; untouched blocks cost address space, not memory."""

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: str = "float32"):
        heads, width = config.num_key_value_heads, padded(config.head_dim, LANES)
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.dtype = dtype
        kept = _KEPT_AS[dtype]
        scales = (num_blocks, heads, block_size) if dtype == "int8" else (0, 0, 0)
        try:
            self.layers = [
                LayerCache(
                    np.zeros((num_blocks, heads, config.head_dim, block_size), kept),
                    np.zeros((num_blocks, heads, block_size, width), kept),
                    np.zeros(scales, np.float32),
                    np.zeros(scales, np.float32),
                )
                for _ in range(config.num_hidden_layers)
            ]
        except MemoryError:
            size = num_blocks * self.block_nbytes(config, block_size, dtype)
            raise UserError(
                f"The system refuses {size / 1e9:.2f} GB for the cache of {num_blocks * block_size} tokens: lower "
                f"max_model_len or max_num_seqs, or set kv_cache_memory."
            ) from None

    @staticmethod
    def block_nbytes(config: ModelConfig, block_size: int, dtype: str = "float32") -> int:
        """Bytes of one block over all layers, keys and values."""
        numbers = (config.head_dim + padded(config.head_dim, LANES)) * np.dtype(_KEPT_AS[dtype]).itemsize
        per_token = config.num_key_value_heads * (numbers + (8 if dtype == "int8" else 0))
        return per_token * block_size * config.num_hidden_layers
