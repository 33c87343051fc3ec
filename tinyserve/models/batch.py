"""What a forward pass is told: some new tokens of some sequences, side by side with no padding.

Knows no model, and not how the tokens were chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from tinyserve.tensor.arena import aligned

Array = np.ndarray


class SequenceCache(Protocol):
    """Where a sequence is in the cache: its blocks, its state slot, and how many of its tokens are there."""

    @property
    def block_table(self) -> list[int]: ...

    @property
    def state_slot(self) -> int: ...

    @property
    def num_computed(self) -> int: ...


Work = Sequence[tuple[Sequence[int], SequenceCache]]  # the new tokens of each sequence


class BatchShape(NamedTuple):
    """What a program for a batch depends on; everything else may change from one run to the next."""

    tokens: int
    sequences: int
    blocks: int  # in a row of the block tables: a power of two, so that a growing sequence seldom changes it
    rows: int  # whose logits are wanted
    all_hidden: bool = False  # whether the hidden states of all tokens are, or only of those rows
    stream_width: int = 0  # of what comes in from layers in another process; 0 where the first layer is here

    @classmethod
    def of(cls, work: Work, rows: int, all_hidden: bool = False, stream_width: int = 0) -> "BatchShape":
        """The shape of these tokens, with so many rows of logits."""
        blocks = tokens = 0
        for token_ids, cache in work:
            blocks, tokens = max(blocks, len(cache.block_table)), tokens + len(token_ids)
        most = max(LEAST_BLOCKS, 1 << (blocks - 1).bit_length())
        return cls(tokens, len(work), most, rows, all_hidden, stream_width)


LEAST_BLOCKS = 32


class Wanted(NamedTuple):
    """The tokens that go on behind the last block's cache: to the others nobody listens any more."""

    rows: Array  # (wanted,) int64: which of the batch
    positions: Array  # (wanted,) int64, as in Batch
    sequence_of: Array  # (wanted,) int64


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
    rows: Array  # int64: the tokens whose logits are wanted
    wanted: Wanted | None  # None: the hidden states of all tokens
    stream: Array  # (tokens, hidden) float32: what layers in another process have made of the tokens
    written: list[list[int]]  # what stands in the rows of the block tables: it seldom changes from step to step

    @classmethod
    def empty(cls, shape: BatchShape) -> "Batch":
        """Room for a batch of this shape."""
        token_ids, positions, slot_mapping, sequence_of = (np.zeros(shape.tokens, np.int64) for _ in range(4))
        rows = np.zeros(shape.rows, np.int64)
        everything = shape.all_hidden or shape.rows == shape.tokens
        return cls(
            token_ids,
            positions,
            slot_mapping,
            sequence_of,
            np.zeros((shape.sequences, shape.blocks), np.int32),
            np.zeros(shape.sequences + 1, np.int64),
            np.zeros(shape.sequences, np.int64),
            rows,
            None if everything else Wanted(rows, np.zeros_like(rows), np.zeros_like(rows)),
            aligned((shape.tokens, shape.stream_width), np.float32),
            [[] for _ in range(shape.sequences)],
        )

    def fill(self, work: Work, rows: Sequence[int], block_size: int, stream: Array | None = None) -> None:
        """Take in the new tokens of some sequences, from their `num_computed` on, in blocks of so many tokens."""
        if stream is not None:
            self.stream[:] = stream
        first = 0
        for i, (token_ids, cache) in enumerate(work):
            table, position = cache.block_table, cache.num_computed
            if table != self.written[i]:
                self.block_tables[i, : len(table)] = table
                self.written[i] = table.copy()
            last = first + len(token_ids)
            if last - first == 1:
                self.token_ids[first], self.positions[first], self.sequence_of[first] = token_ids[0], position, i
                self.slot_mapping[first] = table[position // block_size] * block_size + position % block_size
            else:
                self.token_ids[first:last] = token_ids
                self.positions[first:last] = positions = np.arange(position, position + last - first)
                self.sequence_of[first:last] = i
                blocks = self.block_tables[i, positions // block_size].astype(np.int64)
                self.slot_mapping[first:last] = blocks * block_size + positions % block_size
            self.starts[i + 1] = first = last
            self.state_indices[i] = cache.state_slot
        self.rows[:] = rows
        if self.wanted is not None:
            self.wanted.positions[:], self.wanted.sequence_of[:] = self.positions[rows], self.sequence_of[rows]
