"""The sampling chain, step by step: what each processor and filter that a request asks for changes, and what it leaves.

The steps are sampler.py's, in its order, on one row of logits; the arithmetic is tensor/reference_sampling.py's.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyserve.sampler import LogitsProcessors
from tinyserve.sampling_params import SamplingParams
from tinyserve.scheduling.sequence import Sequence
from tinyserve.tensor.reference_sampling import probabilities_of, stays
from tinyserve.tensor.sampling import FILTERS, PROCESSORS

Array = np.ndarray


@dataclass(eq=False, frozen=True)
class SamplingStep:
    """One step of the chain, and the distribution behind it."""

    name: str
    """"logits" for what the model says, the parameter's name for a step, "choice" for the token that temperature 0
    takes."""
    value: Any
    """What the request asks for: 40 of top_k, for example."""
    changed: int
    """How many logits it has made larger or smaller."""
    removed: int
    """How many tokens it has made impossible."""
    left: int
    """How many tokens can still be chosen."""
    probabilities: Array
    """(vocab,) float64: of what is left, at the temperature in force; they sum to 1."""


_ASKED_BY = {"penalties": ("repetition_penalty", "frequency_penalty", "presence_penalty")}


def sampling_steps(logits: Array, sequence: Sequence, eos_token_ids: frozenset[int]) -> list[SamplingStep]:
    """The steps from a row of logits (vocab,) to what the sequence's next token is drawn from."""
    params, row = sequence.params, logits.astype(np.float32)
    temperature = 1.0
    left = np.isfinite(row)
    steps = [SamplingStep("logits", None, 0, 0, int(left.sum()), _distribution(row, left, temperature))]

    def add(name: str, value: Any, changed: int, now: Array) -> None:
        nonlocal left
        removed = int(left.sum() - now.sum())
        left = now
        found = _distribution(row, left, temperature)
        steps.append(SamplingStep(name, value, changed, removed, int(left.sum()), found))

    if params.changes_logits:
        processors = LogitsProcessors(sequence, eos_token_ids, len(row))
        for name in PROCESSORS:
            before = row.copy()
            getattr(processors, name)(row, list(sequence.output_token_ids))
            now = np.isfinite(row)
            changed = int((now & (row != before)).sum())
            if changed or now.sum() < left.sum():
                add(name, _asked(params, name), changed, now)
    if params.temperature == 0:
        only = np.zeros(len(row), bool)
        only[int(row.argmax())] = True
        add("choice", None, 0, only)
        return steps
    if params.temperature != 1:
        temperature = params.temperature
        add("temperature", temperature, 0, left)
    for name in FILTERS:
        asked = getattr(params, name)
        if asked == _default(name):
            continue
        ids = np.flatnonzero(left)
        ids = ids[np.argsort(-row[ids], kind="stable")]
        now = np.zeros(len(row), bool)
        now[ids[stays(name, row[ids].astype(np.float64), asked, temperature)]] = True
        add(name, asked, 0, now)
    return steps


def _asked(params: SamplingParams, name: str) -> Any:
    fields = _ASKED_BY.get(name, (name,))
    if len(fields) == 1:
        return getattr(params, name)
    asked = {field: getattr(params, field) for field in fields}
    return {field: value for field, value in asked.items() if value != _default(field)}


def _default(name: str) -> Any:
    return SamplingParams.__dataclass_fields__[name].default


def _distribution(row: Array, left: Array, temperature: float) -> Array:
    found = np.zeros(len(row))
    if left.any():
        found[left] = probabilities_of(row[left], temperature)
    return found
