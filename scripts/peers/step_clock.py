"""When the steps of an engine began, and how long each was inside the model; stands in the forward pass's place."""

from dataclasses import dataclass
from time import perf_counter
from typing import Any


@dataclass
class Step:
    """A forward pass, head and greedy choice included."""

    tokens: int
    sequences: int
    began: float
    ended: float

    @property
    def in_model(self) -> float:
        return self.ended - self.began


class StepClock:
    def __init__(self, forward: Any):
        self._forward = forward
        self.steps: list[Step] = []

    def begin(self, *arguments: Any, **options: Any) -> Any:
        return self._forward.begin(*arguments, **options)

    def __call__(self, work: Any, rows: Any, all_hidden: bool = False, stream: Any = None) -> Any:
        began = perf_counter()
        result = self._forward(work, rows, all_hidden, stream)
        tokens = sum(len(token_ids) for token_ids, _ in work)
        self.steps.append(Step(tokens, len(work), began, perf_counter()))
        return result
