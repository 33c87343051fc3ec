"""What steps cost, and how many draft tokens pay: beside a search of all lengths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyserve.scheduling.step_cost import EMA, StepCostModel, best_draft_length


def test_as_many_draft_tokens_as_pay() -> None:
    def most(chances: list[float], cost: float) -> int:
        return best_draft_length(chances, [cost * (i + 1) for i in range(99)])

    assert most([], 0.1) == 0
    assert most([0.1] * 9, 0.15) == 0, "one in ten does not pay for a seventh of a step"
    assert most([0.2] * 9, 0.15) == 1
    assert most([1.0] * 9, 0.99) == 9 and most([1.0] * 9, 1.0) == 0
    assert most([0.9] * 40, 0.05) > most([0.9] * 40, 0.2) > most([0.6] * 40, 0.2) > 0
    assert most([0.05, 1.0, 1.0, 1.0], 0.01) == 4, "what comes later may pay for the first"
    assert best_draft_length([0.4] * 3, [0.25, 0.25, 0.9]) == 2, "the second costs nothing"


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 2)), max_size=8))
def test_no_other_draft_length_pays_more(drafts: list[tuple[float, float]]) -> None:
    chances, costs = [chance for chance, _ in drafts], [cost for _, cost in drafts]

    def rate(count: int) -> float:
        tokens = likely = 1.0
        for chance in chances[:count]:
            likely *= chance
            tokens += likely
        return tokens / (1 + (costs[count - 1] if count else 0))

    best = rate(best_draft_length(chances, costs))
    assert all(rate(count) <= best * (1 + 1e-9) for count in range(len(chances) + 1))


def test_ema_follows_its_samples() -> None:
    average = EMA(0.5)
    assert average.value == 0.5
    for _ in range(100):
        average.update(True)
    assert average.value > 0.95
    for _ in range(30):
        average.update(False)
    assert average.value < 0.3


def test_step_cost_is_a_line() -> None:
    model = StepCostModel()
    assert model.predict(1) == 0
    model.record_step(1, 8.0)
    assert model.predict(1) == 8 and model.predict(3) == 12, "a quarter each, as long as nothing else is known"
    for rows in [1, 9, 5, 17, 1] * 10:
        model.record_step(rows, 7.0 + rows)
    assert model.predict(1) == pytest.approx(8, rel=0.05) and model.predict(33) == pytest.approx(40, rel=0.05)
    for _ in range(20):
        model.record_step(2, 10.0)
        model.record_step(3, 10.0)
    assert model.predict(2) == pytest.approx(model.predict(3), rel=0.02), "where a kernel takes three at a time"
    assert model.predict(4) > model.predict(3)
    model.record_step(500, 1.0)  # a prompt
    model.record_step(1, 10_000.0)  # something else had the machine
    assert model.predict(1) < 10
    slow = StepCostModel()
    slow.record_step(1, 10_000.0)  # compiling
    slow.record_step(1, 8.0)
    assert slow.predict(1) == 8
