"""What a forward pass is told: some new tokens of some sequences, side by side with no padding.

Knows no model, and not how the tokens were chosen.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Batch:
    """New tokens, each with its place in its own sequence and in the cache."""

    token_ids: Array  # (tokens,) int64
    positions: Array  # (tokens,) int64: place in its own sequence
    slot_mapping: Array  # (tokens,) int64: where its keys and values go, block · block_size + offset
    sequence_of: Array  # (tokens,) int64: row of block_tables
    block_tables: Array  # (sequences, most blocks) int32
    starts: Array  # (sequences + 1,) int64: the tokens of sequence i are starts[i] .. starts[i + 1]
    state_indices: Array  # (sequences,) int64: each sequence's state slot, its row of the recurrent states
