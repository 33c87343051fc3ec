"""The KV cache: pages of keys and values for attention layers, a state of fixed size for recurrent layers.

Knows what a block and a state cost; which block and which slot belongs to whom is told by ints from above.
"""

from typing import Any, NamedTuple

import numpy as np

from tinyserve.errors import UserError
from tinyserve.models.config import ATTENTION, MAMBA, ModelConfig
from tinyserve.models.config.costs import state_bytes_per_sequence
from tinyserve.models.dtypes import KV_CACHE_DTYPES
from tinyserve.progress import size
from tinyserve.tensor.arena import aligned, small_pages
from tinyserve.tensor.kv_cache import Pages
from tinyserve.tensor.quant import padded
from tinyserve.tensor.simd import LANES

Array = np.ndarray

# What an element is, and how many numbers it holds: bfloat16 lies in pairs.
_KEPT_AS = {"float32": (np.float32, 1), "bfloat16": (np.uint32, 2), "int8": (np.int8, 1)}


class LayerState(NamedTuple):
    """One Mamba layer's memory, a row for each slot, as tensor/mamba2.py updates it in place."""

    windows: Array  # conv state (slots, d_conv - 1, channels) float32: the convolution's last inputs
    states: Array  # SSM state (slots, heads, d_state, d_head) float32


class KVCache:
    """Every layer's memory: `num_blocks` blocks of `block_size` tokens, and states for `num_slots` sequences.

    That of some `layers` where it is a slice's. What is untouched costs address space, not memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: str = "float32",
        num_slots: int = 1,
        layers: range | None = None,
    ):
        """Raises UserError, with the numbers, where the system refuses the memory."""
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.dtype = dtype
        self._states: list[LayerState] = []
        self._pages: list[Pages] = []
        self.layers: list[Any] = []  # one after the other: Pages or a LayerState
        kinds = config.layer_types if layers is None else config.layer_types[layers.start : layers.stop]
        try:
            for kind in kinds:
                if kind == MAMBA:
                    window, state = config.state_shapes
                    self._states.append(
                        LayerState(
                            aligned((num_slots, *window), np.float32, np.zeros),
                            aligned((num_slots, *state), np.float32, np.zeros),
                        )
                    )
                    self.layers.append(self._states[-1])
                else:
                    self._pages.append(_pages(config, num_blocks, block_size, dtype))
                    self.layers.append(self._pages[-1])
        except MemoryError:
            states = num_slots * state_bytes_per_sequence(config, layers)
            nbytes = num_blocks * self.block_nbytes(config, block_size, dtype, layers) + states
            raise UserError(
                f"The system refuses {size(nbytes)} for the cache of {num_blocks * block_size} tokens: lower "
                f"max_model_len or max_num_seqs, or set kv_cache_memory."
            ) from None

    def reset_state(self, slot: int) -> None:
        """Forget what a slot's last owner left there: a sequence begins with zeros."""
        for layer in self._states:
            layer.windows[slot] = 0
            layer.states[slot] = 0

    def copy_state(self, source: int, target: int) -> None:
        """Make one slot remember what another does."""
        for layer in self._states:
            layer.windows[target] = layer.windows[source]
            layer.states[target] = layer.states[source]

    def copy_block(self, source: int, target: int) -> None:
        """Make one block hold what another does."""
        for layer in self._pages:
            for pages in layer:
                if len(pages):  # there are no scales beside floats
                    pages[target] = pages[source]

    @staticmethod
    def block_nbytes(config: ModelConfig, block_size: int, dtype: str = "float32", layers: range | None = None) -> int:
        """Bytes of one block over all attention layers, or those among some `layers`: keys and values."""
        kind, width = KV_CACHE_DTYPES[dtype], config.head_dim
        # Keys in whole words, and values in whole vectors.
        per_head = kind.head_bytes(padded(width, _KEPT_AS[dtype][1])) + kind.head_bytes(padded(width, LANES))
        return config.num_key_value_heads * per_head * block_size * config.count_layers(ATTENTION, layers)


def _pages(config: ModelConfig, num_blocks: int, block_size: int, dtype: str) -> Pages:
    heads, width, (kept, numbers) = config.num_key_value_heads, padded(config.head_dim, LANES), _KEPT_AS[dtype]
    scales = (num_blocks, heads, block_size) if KV_CACHE_DTYPES[dtype].scale_bytes else (0, 0, 0)
    return Pages(
        small_pages((num_blocks, heads, -(-config.head_dim // numbers), block_size), kept),
        small_pages((num_blocks, heads, block_size // numbers, width), kept),
        np.zeros(scales, np.float32),
        np.zeros(scales, np.float32),
    )
