"""The orders in which matrices of a checkpoint become the rows of one matrix, so that one product computes them all.

Knows counts of rows alone. An order takes the number of rows of each part, and tells how many rows the whole has and
which of them each part's are. Rows that are nobody's are zero.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import numpy as np

from tinyserve.tensor.quant import BLOCK, PANEL, padded

Array = np.ndarray
Index = slice | Array
Places = Sequence[Index]  # for each part, the rows of the whole that are its own, in its order
RowOrder = Callable[[Sequence[int]], tuple[int, Places]]


def concatenated(rows: Sequence[int]) -> tuple[int, Places]:
    """The parts one after the other: q, k and v as one matrix.

        part 0   part 1   part 2             whole
        ┌────┐   ┌────┐   ┌────┐             ┌────┐
        │ q0 │   │ k0 │   │ v0 │             │ q0 │
        │ q1 │   └────┘   └────┘             │ q1 │
        │ q2 │                      ->       │ q2 │
        └────┘                               │ k0 │
                                             │ v0 │
                                             └────┘
    """  # fmt: skip
    ends = list(accumulate(rows))
    return ends[-1], [slice(end - count, end) for end, count in zip(ends, rows, strict=True)]


def interleaved_panels(rows: Sequence[int]) -> tuple[int, Places]:
    """Parts of equal size, a panel of PANEL rows of each in turn, the last panels filled up with zeros.

    Gate and up meet in one tile of the product, which ends in silu(gate) · up.

        part 0     part 1              whole
        ┌──────┐   ┌──────┐           ┌────────┐
        │ g 0… │   │ u 0… │           │ g 0…   │  rows 0 .. PANEL - 1 of part 0
        │ g 1… │   │ u 1… │   ->      │ u 0…   │  the same rows of part 1
        └──────┘   └──────┘           │ g 1… 0 │  the next of part 0, and zeros
                                      │ u 1… 0 │
                                      └────────┘
    """  # fmt: skip
    row, parts = np.arange(rows[0]), len(rows)
    places = [(row // PANEL * parts + i) * PANEL + row % PANEL for i in range(parts)]
    return -(-rows[0] // PANEL) * PANEL * parts, places


def interleaved_halves(rows: Sequence[int]) -> tuple[int, Places]:
    """The same for one part that has gates above what they let through.

        part 0      whole
        ┌──────┐   ┌────────┐
        │ g 0… │   │ g 0…   │
        │ g 1… │   │ u 0…   │
        │ u 0… │ ->│ g 1… 0 │
        │ u 1… │   │ u 1… 0 │
        └──────┘   └────────┘
    """  # fmt: skip
    total, halves = interleaved_panels([rows[0] // 2] * 2)
    return total, [np.concatenate([np.arange(total)[half] for half in halves])]


def expert_by_expert(order: RowOrder, experts: int, rows: Sequence[int]) -> tuple[int, Places]:
    """One part that is so many matrices one above the other: each in `order`, and in whole blocks of BLOCK rows.

        part 0            whole
        ┌───────────┐    ┌───────────────┐
        │ expert 0  │    │ expert 0      │
        │ expert 1  │ -> │ zeros to BLOCK│
        └───────────┘    │ expert 1      │
                         │ zeros to BLOCK│
                         └───────────────┘
    """  # fmt: skip
    total, places = order([rows[0] // experts])
    whole = padded(total, BLOCK)
    each = np.arange(total)[places[0]]
    return whole * experts, [(np.arange(experts)[:, None] * whole + each).ravel()]


def within(start: int, end: int, places: Places) -> Iterator[tuple[int, Index, Index]]:
    """Which rows of which parts belong into rows start..end, and where there: (part, rows of it, rows of these)."""
    for i, place in enumerate(places):
        if isinstance(place, slice):
            first, last = max(start, place.start), min(end, place.stop)
            if first < last:
                yield i, slice(first - place.start, last - place.start), slice(first - start, last - start)
        elif len(mine := np.flatnonzero((place >= start) & (place < end))):
            is_run = mine[-1] - mine[0] + 1 == len(mine)
            yield i, slice(mine[0], mine[-1] + 1) if is_run else mine, place[mine] - start
