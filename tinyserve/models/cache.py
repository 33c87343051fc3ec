"""The key and value cache: pages of memory, one array of each kind a layer.

Knows what a block costs; which block belongs to whom is told by block tables, made of ints, above.
"""

import numpy as np

from tinyserve.config import ModelConfig
from tinyserve.errors import UserError
from tinyserve.tensor.quant import padded
from tinyserve.tensor.simd import LANES

Array = np.ndarray
LayerCache = tuple[Array, Array]  # keys, values


class KVCache:
    """`num_blocks` blocks of `block_size` tokens for every layer; untouched blocks cost address space, not memory."""

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int):
        heads, width = config.num_key_value_heads, padded(config.head_dim, LANES)
        self.block_size = block_size
        self.num_blocks = num_blocks
        try:
            self.layers: list[LayerCache] = [
                (
                    np.zeros((num_blocks, heads, config.head_dim, block_size), np.float32),  # keys, transposed
                    np.zeros((num_blocks, heads, block_size, width), np.float32),
                )
                for _ in range(config.num_hidden_layers)
            ]
        except MemoryError:
            size = num_blocks * self.block_nbytes(config, block_size)
            raise UserError(
                f"The system refuses {size / 1e9:.2f} GB for the cache of {num_blocks * block_size} tokens: lower "
                f"max_model_len or max_num_seqs, or set kv_cache_memory."
            ) from None

    @staticmethod
    def block_nbytes(config: ModelConfig, block_size: int) -> int:
        """Bytes of one block over all layers, keys and values."""
        per_token = config.num_key_value_heads * (config.head_dim + padded(config.head_dim, LANES)) * 4
        return per_token * block_size * config.num_hidden_layers
