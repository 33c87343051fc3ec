"""A step is cut into batches that compute what it would have: each token once, in order, in its place."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyserve.pipeline import micro_batches as module
from tinyserve.pipeline.micro_batches import LEAST, SequencePlace, micro_batches

pytestmark = pytest.mark.fast


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Any], list[int]]:
    """Sequences with some computed tokens and some new ones, and rows: none, the last, or some at the end."""
    work, rows, first = list[Any](), list[int](), 0
    for i in range(draw(st.integers(1, 8))):
        new, computed = draw(st.one_of(st.integers(1, 5), st.integers(1, 500))), draw(st.integers(0, 100))
        work.append(([1000 * i + j for j in range(new)], SequencePlace([i], i, computed)))
        rows += range(first + new - draw(st.integers(0, min(new, 3))), first + new)
        first += new
    return work, rows


def tokens(work: list[Any]) -> list[tuple[int, int, int]]:
    """Slot, position and id of each."""
    return [
        (place.state_slot, place.num_computed + i, token)
        for token_ids, place in work
        for i, token in enumerate(token_ids)
    ]


@given(steps(), st.integers(1, 8), st.sampled_from([1, 7, 64]))
def test_cutting_a_step(step: tuple[list[Any], list[int]], count: int, least: int) -> None:
    work, rows = step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LEAST", least)
        batches = micro_batches(work, rows, count)
    assert 1 <= len(batches) <= count
    sizes = [sum(len(ids) for ids, _ in batch.work) for batch in batches]
    assert len({*sizes[:-1]}) <= 1 and all(size >= min(least, sizes[0]) for size in sizes)
    assert not any(batch.rows for batch in batches[:-1])
    for slot in range(len(work)):
        cut = [token for batch in batches for token in tokens(batch.work) if token[0] == slot]
        assert cut == tokens([work[slot]])
    whole, last = tokens(work), tokens(batches[-1].work)
    assert [last[row] for row in batches[-1].rows] == [whole[row] for row in rows]
    for batch in batches:
        slots = [place.state_slot for _, place in batch.work]
        assert len(slots) == len(set(slots)) and all(ids for ids, _ in batch.work)


def test_what_is_cut() -> None:
    place = SequencePlace([0], 0, 0)
    decoding = [([7], SequencePlace([i], i, 50)) for i in range(16)]
    assert len(micro_batches(decoding, range(16), 4)) == 1, "every token is the last of its sequence"
    chunk = micro_batches([*decoding, ([1] * 496, place)], range(16), 4)
    assert [sum(len(ids) for ids, _ in batch.work) for batch in chunk] == [128] * 4
    assert chunk[-1].rows == [*range(16)] and len(chunk[-1].work) == 17
    prompts = [([1] * 100, SequencePlace([i], i, 0)) for i in range(5)]
    cut = micro_batches(prompts, [99, 199, 299, 399, 499], 4)
    assert [sum(len(ids) for ids, _ in batch.work) for batch in cut] == [125] * 4
    assert len(micro_batches([([1] * (2 * LEAST - 1), place)], [], 4)) == 1
    assert len(micro_batches([([1] * (2 * LEAST), place)], [], 4)) == 2
