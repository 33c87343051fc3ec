"""Who holds which block of the cache, and what text is still in it. Ints only: the memory is the model runner's.

A text is known by a chain: a key stands for all tokens up to the end of a block, and the next block's text is found by
that key and the tokens behind it. Keys are serial numbers given out once, so that nothing can be taken for another.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import count
from typing import NamedTuple

ROOT = 0  # the key of the empty text


class Known(NamedTuple):
    """A text that is in the cache: its last block, and the key that stands for all of it."""

    block: int
    key: int


class BlockManager:
    """Hands out block numbers and takes them back. A block may be held several times; whoever shares one only reads it.

    A block that nobody holds is free. It may remember a text until it is given to somebody else: those are taken last,
    the least recently used first. `on_forget` is told the key of each text that is lost.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.on_forget: Callable[[int], None] = lambda key: None
        self._holders = [0] * num_blocks
        self._blank = deque(range(num_blocks))
        self._remembering: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._known: dict[tuple[int, tuple[int, ...]], Known] = {}
        self._texts: dict[int, list[tuple[int, tuple[int, ...]]]] = {}  # of a block: each a beginning of the next
        self._keys = count(ROOT + 1)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._blank) + len(self._remembering)

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-tokens // self.block_size)

    def holders(self, block: int) -> int:
        """How many times a block is held."""
        return self._holders[block]

    def allocate(self, count: int) -> list[int]:
        """Blocks for one holder, `num_free` at most; what they remember is forgotten."""
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.popleft()
            else:
                block, _ = self._remembering.popitem(last=False)
                self._forget(block)
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: list[int]) -> None:
        """Hold blocks that others hold, or that remember something. Raises KeyError for any other."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._remembering[block]
            self._holders[block] += 1

    def free(self, blocks: list[int]) -> None:
        """Give up a sequence's blocks, the last first: an ending is forgotten before its beginning, which it needs.

        Raises KeyError for a block that is not out.
        """
        for block in reversed(blocks):
            if not (0 <= block < self.num_blocks and self._holders[block]):
                raise KeyError(block)
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._texts:
                    self._remembering[block] = None
                else:
                    self._blank.append(block)

    def remember(self, block: int, parent: int, tokens: tuple[int, ...]) -> Known:
        """Note that a held block begins with these tokens, behind the text of key `parent`.

        Where that text is known already, this changes nothing, and what is known is returned.
        """
        text = parent, tokens
        if text not in self._known:
            self._known[text] = Known(block, next(self._keys))
            self._texts.setdefault(block, []).append(text)
        return self._known[text]

    def find(self, parent: int, tokens: tuple[int, ...]) -> Known | None:
        """Where these tokens are, behind the text of key `parent`."""
        return self._known.get((parent, tokens))

    def forget(self, blocks: list[int]) -> None:
        """Make held blocks remember nothing: whoever shares one keeps it, and nobody finds it any more."""
        for block in blocks:
            if block in self._texts:
                self._forget(block)

    def _forget(self, block: int) -> None:
        for text in self._texts.pop(block):
            self.on_forget(self._known.pop(text).key)
