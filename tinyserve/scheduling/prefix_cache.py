"""How much of a prompt need not be computed, because its beginning is in the cache: the same question for every model.

Moves ints only. What each class knows of models is what must be at hand to go on from a position: keys and values of
all tokens before it, or a state as it was just there.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tinyserve.scheduling.block_manager import ROOT, BlockManager
from tinyserve.scheduling.sequence import Sequence

CopyState = Callable[[int, int], None]  # from one slot to another


class Prefix(NamedTuple):
    """The beginning of a text that is in the cache."""

    num_tokens: int = 0
    blocks: tuple[int, ...] = ()  # full ones, to be shared
    key: int = ROOT  # of the last of them
    tail: int | None = None  # a block whose first tokens come next: to be copied
    state_slot: int | None = None  # the state behind all these tokens: to be copied
    split_at: int = 0  # the next to come this far could go on from here: a chunk should end here


class NoPrefixCache:
    """Remembers nothing."""

    def __init__(self, blocks: BlockManager):
        self.blocks = blocks

    def reusable_prefix(self, token_ids: list[int]) -> Prefix:
        """What is in the cache of a text whose last token, at least, is to be computed."""
        return Prefix()

    def record(self, sequence: Sequence, copy_state: CopyState) -> None:
        """A step that succeeded has brought the sequence to its `num_computed`."""

    def keep_place(self, sequence: Sequence, copy_state: CopyState) -> None:
        """Make where a sequence is now a place to go on from, also when it has gone on in another way."""

    def keep_state(self, sequence: Sequence) -> int:
        """A sequence stops running at its `num_computed`: returns the slot that is free now, its own or another."""
        return sequence.state_slot


class BlockPrefixCache(NoPrefixCache):
    """For attention alone: every full block is a place to go on from, and wherever a sequence has stopped."""

    def reusable_prefix(self, token_ids: list[int]) -> Prefix:
        chain, size = self._chain(token_ids), self.blocks.block_size
        shared, start = self._shared(chain), len(chain) * size
        for end in range(min(start + size, len(token_ids)) - 1, start, -1):
            if known := self.blocks.find(shared[1], tuple(token_ids[start:end])):
                return Prefix(end, *shared, tail=known.block)
        return Prefix(start, *shared)

    def record(self, sequence: Sequence, copy_state: CopyState) -> None:
        """Remember the blocks that are full now; one that was known already takes the place of its double."""
        size = self.blocks.block_size
        for i in range(sequence.num_recorded, sequence.num_computed // size):
            block = sequence.block_table[i]
            known = self.blocks.remember(block, sequence.key, tuple(sequence.token_ids[i * size : (i + 1) * size]))
            if known.block != block:  # the bits are the same: whoever computed them first
                self.blocks.share([known.block])
                sequence.block_table[i] = known.block
                self.blocks.free([block])
            sequence.key, sequence.num_recorded = known.key, i + 1

    def keep_place(self, sequence: Sequence, copy_state: CopyState) -> None:
        self._remember_tail(sequence)

    def keep_state(self, sequence: Sequence) -> int:
        self._remember_tail(sequence)
        return super().keep_state(sequence)

    def _remember_tail(self, sequence: Sequence) -> None:
        if tokens := self._tail_tokens(sequence):
            self.blocks.remember(sequence.block_table[sequence.num_recorded], sequence.key, tokens)

    def _tail_tokens(self, sequence: Sequence) -> tuple[int, ...]:
        """What is computed of a sequence in its last block, if that is not full."""
        return tuple(sequence.token_ids[sequence.num_recorded * self.blocks.block_size : sequence.num_computed])

    def _chain(self, token_ids: list[int]) -> list[tuple[int, int]]:
        """The full blocks that are known of a text but its last token, each with its key."""
        size, key = self.blocks.block_size, ROOT
        chain: list[tuple[int, int]] = []
        for start in range(0, len(token_ids) - size, size):
            known = self.blocks.find(key, tuple(token_ids[start : start + size]))
            if known is None:
                break
            key = known.key
            chain.append(known)
        return chain

    def _shared(self, chain: list[tuple[int, int]]) -> tuple[tuple[int, ...], int]:
        return tuple(block for block, _ in chain), chain[-1][1] if chain else ROOT


class Snapshot(NamedTuple):
    """A state that was kept: behind the text of key `parent` and a few tokens more, the beginning of block `tail`."""

    parent: int
    tokens: tuple[int, ...]
    tail: int | None
    state_slot: int


class StatePrefixCache(BlockPrefixCache):
    """For recurrent layers: a state cannot be wound back, so only where a snapshot of it was kept can others go on.

    One is kept at the end of each prompt, wherever a sequence stops, in a long prompt at the end of a chunk when
    `stride` tokens have passed, and where a text has left what was known: the next to come this far may too. The least
    recently used gives up its slot.
    """

    def __init__(self, blocks: BlockManager, slots: Iterable[int], stride: int = 2048):
        super().__init__(blocks)
        self.stride = stride
        self._free_slots = list(slots)
        self.num_slots = len(self._free_slots)
        # By the key of the text they stand behind, which is lost with the block that holds its end.
        self._snapshots: OrderedDict[int, Snapshot] = OrderedDict()
        self.blocks.on_forget = self._drop

    @property
    def num_snapshots(self) -> int:
        return len(self._snapshots)

    def reusable_prefix(self, token_ids: list[int]) -> Prefix:
        chain, size = self._chain(token_ids), self.blocks.block_size
        depth = {key: i + 1 for i, (_, key) in enumerate(chain)} | {ROOT: 0}
        longest, found = 0, None
        for key, (parent, tokens, _, _) in self._snapshots.items():
            if parent not in depth:
                continue
            start = depth[parent] * size
            end = start + len(tokens)
            if longest < end < len(token_ids) and tuple(token_ids[start:end]) == tokens:
                longest, found = end, key
        known = len(chain) * size
        split_at = known if known > longest and self.num_slots else 0
        if found is None:
            return Prefix(split_at=split_at)
        self._snapshots.move_to_end(found)
        snapshot = self._snapshots[found]
        shared = self._shared(chain[: depth[snapshot.parent]])
        return Prefix(longest, *shared, snapshot.tail, snapshot.state_slot, split_at)

    def record(self, sequence: Sequence, copy_state: CopyState) -> None:
        super().record(sequence, copy_state)
        done, is_prefill = sequence.num_computed, len(sequence.token_ids) - sequence.num_computed > 1
        passed_stride = is_prefill and done - sequence.last_snapshot >= self.stride
        if passed_stride or done in (len(sequence.prompt_token_ids), sequence.split_at):
            self.keep_place(sequence, copy_state)

    def keep_place(self, sequence: Sequence, copy_state: CopyState) -> None:
        sequence.last_snapshot = sequence.num_computed
        if (key := self._new_key(sequence)) is not None:
            copy_state(sequence.state_slot, self._free_slots[-1])  # what interrupts this leaves no snapshot behind
            self._add(key, sequence, self._free_slots.pop())

    def keep_state(self, sequence: Sequence) -> int:
        """The sequence's own slot becomes the snapshot's: nothing is copied."""
        key = self._new_key(sequence) if sequence.num_computed else None
        if key is None:
            return sequence.state_slot
        self._add(key, sequence, sequence.state_slot)
        return self._free_slots.pop()

    def _new_key(self, sequence: Sequence) -> int | None:
        """The key of all that is computed of a sequence, and a free slot for its state; None where one has it."""
        key, tokens = sequence.key, self._tail_tokens(sequence)
        if tokens:
            key = self.blocks.remember(sequence.block_table[sequence.num_recorded], key, tokens).key
        if key in self._snapshots:
            self._snapshots.move_to_end(key)
            return None
        if not self._free_slots and self._snapshots:
            self._drop(next(iter(self._snapshots)))
        return key if self._free_slots else None

    def _add(self, key: int, sequence: Sequence, slot: int) -> None:
        tokens = self._tail_tokens(sequence)
        known = self.blocks.find(sequence.key, tokens) if tokens else None
        self._snapshots[key] = Snapshot(sequence.key, tokens, known.block if known else None, slot)

    def _drop(self, key: int) -> None:
        if snapshot := self._snapshots.pop(key, None):
            self._free_slots.append(snapshot.state_slot)
