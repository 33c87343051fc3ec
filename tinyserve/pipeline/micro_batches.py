"""A step as several batches, so that slices work at the same time: one on the first tokens, one on those behind them.

Ints only. The bits do not change: a token's numbers do not depend on which chunk of its prompt it came with.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tinyserve.models.batch import SequenceCache, Work

LEAST = 64  # tokens: with fewer, a matrix product waits for its weights
PER_SLICE = 2  # for 2 slices 4, which take 5 turns of a quarter of the tokens where 2 took 2 of all: 1.6 times as fast


class SequencePlace(NamedTuple):
    """A `SequenceCache` as it is at some token."""

    block_table: list[int]
    state_slot: int
    num_computed: int

    @classmethod
    def of(cls, cache: "SequenceCache", num_tokens: int = 0) -> "SequencePlace":
        """Where a sequence is when so many of its new tokens are computed, whatever becomes of it then."""
        return cls(list(cache.block_table), cache.state_slot, cache.num_computed + num_tokens)


class MicroBatch(NamedTuple):
    """A part of a step: new tokens of some sequences, and the rows whose logits are wanted."""

    work: list[tuple[Sequence[int], SequencePlace]]
    rows: list[int]


def micro_batches(work: "Work", rows: Sequence[int], count: int) -> list[MicroBatch]:
    """Cut a step into `count` batches or fewer, to be computed in this order; only the last one has `rows`.

    The others are of equal size, and take tokens that nothing has to be known of before those behind them: of prompts.
    """
    total = sum(len(token_ids) for token_ids, _ in work)
    size = max(LEAST, -(-total // count))
    free, first = list[int](), 0  # of each sequence, the tokens before the first whose logits are wanted
    for token_ids, _ in work:
        wanted = [row - first for row in rows if first <= row < first + len(token_ids)]
        free.append(min(wanted, default=len(token_ids)))
        first += len(token_ids)
    taken, batches = [0] * len(work), list[MicroBatch]()
    for _ in range(max(0, min(sum(free), total - size)) // size):
        batch, room = list[tuple[Sequence[int], SequencePlace]](), size
        for i, (token_ids, cache) in enumerate(work):
            start, number = taken[i], min(room, free[i] - taken[i])
            if number > 0:
                batch.append((token_ids[start : start + number], SequencePlace.of(cache, start)))
                taken[i], room = start + number, room - number
        batches.append(MicroBatch(batch, []))
    rest, left, first, gone = list[tuple[Sequence[int], SequencePlace]](), list[int](), 0, 0
    for (token_ids, cache), start in zip(work, taken, strict=True):
        gone += start
        left += [row - gone for row in rows if first <= row < first + len(token_ids)]
        first += len(token_ids)
        if start < len(token_ids):
            rest.append((token_ids[start:], SequencePlace.of(cache, start)))
    return [*batches, MicroBatch(rest, left)]
