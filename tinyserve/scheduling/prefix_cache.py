"""Prefix caching: how much of a prompt need not be computed because its beginning is in the cache.

Moves ints only. What each class knows of models is what must be at hand to go on from a position: keys and values of
all tokens before it, or a recurrent state as it was just there.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tinyserve.scheduling.block_manager import ROOT_PREFIX, BlockManager, CachedBlock
from tinyserve.scheduling.sequence import Sequence

CopyState = Callable[[int, int], None]  # from one slot to another


class Prefix(NamedTuple):
    """The beginning of a text that is in the cache."""

    num_tokens: int = 0
    blocks: tuple[int, ...] = ()  # full ones, to be shared
    prefix_id: int = ROOT_PREFIX  # of the last of them
    partial_block: int | None = None  # a block whose first tokens come next: to be copied
    state_slot: int | None = None  # the state behind all these tokens: to be copied
    chunk_boundary: int = 0  # a chunk should end here: a snapshot of the state is worth keeping


class NoPrefixCache:
    """Caches nothing."""

    def __init__(self, blocks: BlockManager):
        self.blocks = blocks

    def reusable_prefix(self, token_ids: list[int]) -> Prefix:
        """What is cached of a text whose last token, at least, is to be computed."""
        return Prefix()

    def record(self, sequence: Sequence, copy_state: CopyState) -> None:
        """Cache what a step that succeeded has computed, up to the sequence's `num_computed`."""

    def take_snapshot(self, sequence: Sequence, copy_state: CopyState) -> None:
        """Make others able to go on from where a sequence is now, whatever it computes next."""

    def release_into_snapshot(self, sequence: Sequence) -> int:
        """A sequence stops running at its `num_computed`: returns the slot that is free now, its own or another."""
        return sequence.cache.state_slot


class BlockPrefixCache(NoPrefixCache):
    """For models of attention alone: others go on behind every full block, and from wherever a sequence stopped."""

    def reusable_prefix(self, token_ids: list[int]) -> Prefix:
        chain, size = self._chain(token_ids), self.blocks.block_size
        shared, start = self._shared(chain), len(chain) * size
        for end in range(min(start + size, len(token_ids)) - 1, start, -1):
            if cached := self.blocks.find(shared[1], tuple(token_ids[start:end])):
                return Prefix(end, *shared, partial_block=cached.block)
        return Prefix(start, *shared)

    def record(self, sequence: Sequence, copy_state: CopyState) -> None:
        """Register the blocks that are full now; one whose text is cached already gives way to that block."""
        size, cache = self.blocks.block_size, sequence.cache
        for i in range(cache.num_cached_blocks, cache.num_computed // size):
            block = cache.block_table[i]
            tokens = tuple(sequence.token_ids[i * size : (i + 1) * size])
            cached = self.blocks.register(block, cache.prefix_id, tokens)
            if cached.block != block:  # the bits are the same, whoever computed them
                self.blocks.incref([cached.block])
                cache.block_table[i] = cached.block
                self.blocks.free([block])
            cache.prefix_id, cache.num_cached_blocks = cached.prefix_id, i + 1

    def take_snapshot(self, sequence: Sequence, copy_state: CopyState) -> None:
        self._register_partial_block(sequence)

    def release_into_snapshot(self, sequence: Sequence) -> int:
        self._register_partial_block(sequence)
        return super().release_into_snapshot(sequence)

    def _register_partial_block(self, sequence: Sequence) -> CachedBlock | None:
        """Register a sequence's last block as far as it is computed; None where it is empty or full."""
        cache, tokens = sequence.cache, self._partial_tokens(sequence)
        if not tokens:
            return None
        return self.blocks.register(cache.block_table[cache.num_cached_blocks], cache.prefix_id, tokens)

    def _partial_tokens(self, sequence: Sequence) -> tuple[int, ...]:
        """What is computed of a sequence in its last block, if that is not full."""
        cache = sequence.cache
        return tuple(sequence.token_ids[cache.num_cached_blocks * self.blocks.block_size : cache.num_computed])

    def _chain(self, token_ids: list[int]) -> list[CachedBlock]:
        """The full blocks that are cached of a text but its last token."""
        size, prefix_id = self.blocks.block_size, ROOT_PREFIX
        chain: list[CachedBlock] = []
        for start in range(0, len(token_ids) - size, size):
            cached = self.blocks.find(prefix_id, tuple(token_ids[start : start + size]))
            if cached is None:
                break
            prefix_id = cached.prefix_id
            chain.append(cached)
        return chain

    def _shared(self, chain: list[CachedBlock]) -> tuple[tuple[int, ...], int]:
        return tuple(cached.block for cached in chain), chain[-1].prefix_id if chain else ROOT_PREFIX


class Snapshot(NamedTuple):
    """A copy of a state: behind the prefix of id `parent` and a few tokens more, the beginning of `partial_block`."""

    parent: int
    tokens: tuple[int, ...]
    partial_block: int | None
    state_slot: int


class StatePrefixCache(BlockPrefixCache):
    """For models with recurrent layers: a state cannot be wound back, so others go on only from snapshots of it.

    One is taken at the end of each prompt, wherever a sequence stops, in a long prompt at the end of a chunk when
    `stride` tokens have passed, and where a prompt leaves a cached text, since the next may leave it there too. Slots
    for snapshots are reused by LRU eviction.
    """

    def __init__(self, blocks: BlockManager, slots: Iterable[int], stride: int = 2048):
        super().__init__(blocks)
        self.stride = stride
        self._free_slots = list(slots)
        self.num_slots = len(self._free_slots)
        # By prefix id, least recently used first; one is dropped with the block that holds the end of its prefix.
        self._snapshots: OrderedDict[int, Snapshot] = OrderedDict()
        self.blocks.on_evict = self._drop

    def reusable_prefix(self, token_ids: list[int]) -> Prefix:
        chain, size = self._chain(token_ids), self.blocks.block_size
        depth = {cached.prefix_id: i + 1 for i, cached in enumerate(chain)} | {ROOT_PREFIX: 0}
        longest, found = 0, None
        for prefix_id, (parent, tokens, _, _) in self._snapshots.items():
            if parent not in depth:
                continue
            start = depth[parent] * size
            end = start + len(tokens)
            if longest < end < len(token_ids) and tuple(token_ids[start:end]) == tokens:
                longest, found = end, prefix_id
        cached_tokens = len(chain) * size
        chunk_boundary = cached_tokens if cached_tokens > longest and self.num_slots else 0
        if found is None:
            return Prefix(chunk_boundary=chunk_boundary)
        self._snapshots.move_to_end(found)
        snapshot = self._snapshots[found]
        shared = self._shared(chain[: depth[snapshot.parent]])
        return Prefix(longest, *shared, snapshot.partial_block, snapshot.state_slot, chunk_boundary)

    def record(self, sequence: Sequence, copy_state: CopyState) -> None:
        super().record(sequence, copy_state)
        done, cache = sequence.cache.num_computed, sequence.cache
        passed_stride = sequence.num_uncomputed > 1 and done - cache.last_snapshot >= self.stride
        if passed_stride or done in (len(sequence.prompt_token_ids), cache.chunk_boundary):
            self.take_snapshot(sequence, copy_state)

    def take_snapshot(self, sequence: Sequence, copy_state: CopyState) -> None:
        sequence.cache.last_snapshot = sequence.cache.num_computed
        if (prefix_id := self._new_snapshot_id(sequence)) is not None:
            copy_state(sequence.cache.state_slot, self._free_slots[-1])  # an exception here leaves no snapshot behind
            self._add(prefix_id, sequence, self._free_slots.pop())

    def release_into_snapshot(self, sequence: Sequence) -> int:
        """The sequence's own slot becomes the snapshot's: nothing is copied."""
        prefix_id = self._new_snapshot_id(sequence) if sequence.cache.num_computed else None
        if prefix_id is None:
            return sequence.cache.state_slot
        self._add(prefix_id, sequence, sequence.cache.state_slot)
        return self._free_slots.pop()

    def _new_snapshot_id(self, sequence: Sequence) -> int | None:
        """The id of all that is computed of a sequence, with a slot free for its state; None where there is none.

        There is none to take where that prefix has a snapshot already, which is used now, or there are no slots.
        """
        partial = self._register_partial_block(sequence)
        prefix_id = partial.prefix_id if partial else sequence.cache.prefix_id
        if prefix_id in self._snapshots:
            self._snapshots.move_to_end(prefix_id)
            return None
        if not self._free_slots and self._snapshots:
            self._drop(next(iter(self._snapshots)))
        return prefix_id if self._free_slots else None

    def _add(self, prefix_id: int, sequence: Sequence, slot: int) -> None:
        parent, tokens = sequence.cache.prefix_id, self._partial_tokens(sequence)
        cached = self.blocks.find(parent, tokens) if tokens else None
        self._snapshots[prefix_id] = Snapshot(parent, tokens, cached.block if cached else None, slot)

    def _drop(self, prefix_id: int) -> None:
        if snapshot := self._snapshots.pop(prefix_id, None):
            self._free_slots.append(snapshot.state_slot)
