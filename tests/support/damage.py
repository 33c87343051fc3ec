"""A model that computes no numbers for whoever says a given token, and right ones for everybody else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from tinyserve import LLM
from tinyserve.models.forward import ForwardPass
from tinyserve.tensor.program import instruction


@instruction
def _damage(team, hidden, whose, token_ids, sequence_of, token):
    """Rows of sequences that have this token in the batch become nan."""
    for i in range(team.thread, len(hidden), team.threads):
        for j in range(len(token_ids)):
            if sequence_of[j] == whose[i] and token_ids[j] == token:
                for h in range(hidden.shape[1]):
                    hidden[i, h] = np.nan


class _Damaged:
    def __init__(self, model: Any, token: int):
        self.model, self.token, self.config = model, token, model.config

    def __call__(self, batch: Any, cache: Any) -> Any:
        hidden = self.model(batch, cache)
        whose = batch.sequence_of if batch.wanted is None else batch.wanted.sequence_of
        _damage(hidden, whose, batch.token_ids, batch.sequence_of, self.token)
        return hidden

    def logits(self, hidden: Any) -> Any:
        return self.model.logits(hidden)


@contextmanager
def damaged_by(token: int, llm: LLM) -> Iterator[None]:
    """Within, the model answers nan for every row that follows from this token."""
    runner: Any = llm.engine.runner
    healthy = runner.forward
    runner.forward = ForwardPass(_Damaged(runner.model, token), runner.cache)  # type: ignore[arg-type]
    try:
        yield
    finally:
        runner.forward = healthy
