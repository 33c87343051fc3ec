"""Which blocks of the cache are free. Ints only: the memory behind them is the model runner's."""

from collections import deque


class BlockAllocator:
    """Hands out block numbers and takes them back; each has one owner."""

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = deque(range(num_blocks))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-tokens // self.block_size)

    def can_allocate(self, tokens: int) -> bool:
        return self.blocks_for(tokens) <= self.num_free

    def allocate(self, tokens: int) -> list[int]:
        """Blocks for this many tokens; ask `can_allocate` first."""
        blocks = [self._free.popleft() for _ in range(self.blocks_for(tokens))]
        self._used.update(blocks)
        return blocks

    def free(self, blocks: list[int]) -> None:
        """Take blocks back. Raises KeyError for one that is not out."""
        for block in blocks:
            self._used.remove(block)
            self._free.append(block)
