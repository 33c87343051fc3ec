"""The blocks of the paged KV cache: reference counts, the prefixes that they hold, and LRU eviction.

Ints only: the memory is the model runner's. A prefix is known by a chain: a prefix id stands for all tokens up to the
end of a block, and the next block is found by that id and the tokens behind it. Ids are serial numbers given out once:
unlike hashes, two prefixes never have the same.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

ROOT_PREFIX = 0  # the id of the empty prefix


class CachedBlock(NamedTuple):
    """A prefix in the cache: its last block, and the id of all of it."""

    block: int
    prefix_id: int


class BlockManager:
    """Allocates the blocks that block tables list; one that is shared (reference count above 1) is only read.

    A block with reference count 0 is free. Its prefixes stay in the cache until it is allocated again: blocks without
    prefixes go first, then the least recently used. `on_evict` is called with the id of each prefix that is lost.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.on_evict: Callable[[int], None] = lambda prefix_id: None
        self._ref_counts = [0] * num_blocks
        self._uncached_free = deque(range(num_blocks))
        self._cached_free: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._cached: dict[tuple[int, tuple[int, ...]], CachedBlock] = {}  # by parent prefix and tokens
        self._keys_of: dict[int, list[tuple[int, tuple[int, ...]]]] = {}  # by block; each extends the key before it
        self._prefix_ids = count(ROOT_PREFIX + 1)

    @property
    def num_free(self) -> int:
        """Blocks with reference count 0, cached prefixes or not."""
        return len(self._uncached_free) + len(self._cached_free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-tokens // self.block_size)

    def ref_count(self, block: int) -> int:
        """How many times a block is held."""
        return self._ref_counts[block]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with reference count 1, at most `num_free`; the prefixes they hold are evicted."""
        blocks = []
        for _ in range(count):
            if self._uncached_free:
                block = self._uncached_free.popleft()
            else:
                block, _ = self._cached_free.popitem(last=False)
                self._evict(block)
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def incref(self, blocks: list[int]) -> None:
        """Hold blocks that are held already, or are free with a cached prefix. Raises KeyError for any other."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._cached_free[block]
            self._ref_counts[block] += 1

    def free(self, blocks: list[int]) -> None:
        """Give up a sequence's blocks, the last first: LRU eviction takes the end of a prefix before its beginning.

        Raises KeyError for a block that is not held.
        """
        for block in reversed(blocks):
            if not (0 <= block < self.num_blocks and self._ref_counts[block]):
                raise KeyError(block)
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if block in self._keys_of:
                    self._cached_free[block] = None
                else:
                    self._uncached_free.appendleft(block)  # memory that was touched is used again first

    def register(self, block: int, parent: int, tokens: tuple[int, ...]) -> CachedBlock:
        """Cache a prefix: a held block begins with these tokens, behind the prefix of id `parent`.

        Where that prefix is cached already nothing changes, and the block that holds it is returned.
        """
        key = parent, tokens
        if key not in self._cached:
            self._cached[key] = CachedBlock(block, next(self._prefix_ids))
            self._keys_of.setdefault(block, []).append(key)
        return self._cached[key]

    def find(self, parent: int, tokens: tuple[int, ...]) -> CachedBlock | None:
        """Where these tokens are cached, behind the prefix of id `parent`."""
        return self._cached.get((parent, tokens))

    def evict(self, blocks: list[int]) -> None:
        """Remove held blocks from the prefix cache: their holders keep them, no other sequence finds them."""
        for block in blocks:
            if block in self._keys_of:
                self._evict(block)

    def forget(self) -> None:
        """Nothing is cached any more, in held blocks or free ones: their memory is lost."""
        for block in list(self._keys_of):
            self._evict(block)
        self._uncached_free += self._cached_free
        self._cached_free.clear()

    def _evict(self, block: int) -> None:
        for key in self._keys_of.pop(block):
            self.on_evict(self._cached.pop(key).prefix_id)
