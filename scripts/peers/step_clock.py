"""When the steps of an engine began, and how long each was inside the model; stands in the model's place."""

from dataclasses import dataclass
from time import perf_counter
from typing import Any


@dataclass
class Step:
    """A call of the model and its head; the time between the two is the head's preparation, and counted."""

    tokens: int
    sequences: int
    began: float
    ended: float

    @property
    def in_model(self) -> float:
        return self.ended - self.began


class StepClock:
    def __init__(self, model: Any):
        self._model = model
        self.steps: list[Step] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, batch: Any, cache: Any) -> Any:
        step = Step(len(batch.token_ids), len(batch.state_indices), perf_counter(), 0.0)
        hidden = self._model(batch, cache)
        step.ended = perf_counter()
        self.steps.append(step)
        return hidden

    def logits(self, hidden: Any) -> Any:
        logits = self._model.logits(hidden)
        self.steps[-1].ended = perf_counter()
        return logits
