"""Makes an explanation: taps a model between the steps of its engine, and puts together what is found."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from tinyserve.errors import RequestError, TinyserveError
from tinyserve.explain.explanation import Array, Explanation, costs_of
from tinyserve.explain.sampling_steps import sampling_steps
from tinyserve.explain.taps import tap
from tinyserve.sampler import DAMAGED
from tinyserve.scheduling.sequence import Sequence
from tinyserve.tensor._jit import one_at_a_time

if TYPE_CHECKING:
    from tinyserve.engine import EngineThread
    from tinyserve.models.base import DecoderModel

T = TypeVar("T")

MOST_TOKENS = 512  # a head's attention weights are as many numbers squared


class Subject(NamedTuple):
    """A model that is loaded, and what is known of it."""

    name: str
    model: "DecoderModel"
    kv_cache_dtype: str
    thread: "EngineThread"  # which owns the kernels
    num_threads: int
    text_of: Callable[[int], str]
    eos_token_ids: frozenset[int]
    owner: object  # is kept alive: an explanation asks the model again, for its lens


def explain(subject: Subject, sequence: Sequence, prompt: str | None) -> Explanation:
    """Explain a request that is not queued; raises RequestError for one that is too long, or that has a grammar."""
    ids = sequence.prompt_token_ids
    if len(ids) > MOST_TOKENS:
        raise RequestError(
            f"The prompt has {len(ids)} tokens, and an explanation is of {MOST_TOKENS} at most: what every head sees "
            f"of every token is kept. Shorten the prompt.",
            param="prompt",
        )
    if sequence.matcher is not None:
        raise RequestError(
            "An explanation shows no structured outputs and no budgets of thought: leave them out.",
            param="structured_outputs",
        )
    taps = tap(subject.model, ids, subject.kv_cache_dtype, partial(_between_steps, subject))

    def read_out(hidden: Array) -> Array:
        return _between_steps(subject, partial(subject.model.logits, hidden))

    logits = read_out(np.ascontiguousarray(taps.stream[-1]))
    if not np.isfinite(logits.max()):
        raise TinyserveError(DAMAGED)
    return Explanation(
        subject.name,
        prompt,
        list(ids),
        [subject.text_of(token) for token in ids],
        taps.stream,
        taps.layers,
        logits,
        sampling_steps(logits[-1], sequence, subject.eos_token_ids),
        costs_of(subject.model),
        subject.text_of,
        read_out,
    )


def _between_steps(subject: Subject, function: Callable[[], T]) -> T:
    def owning_the_kernels() -> T:
        with one_at_a_time(subject.num_threads):
            return function()

    return subject.thread.call(owning_the_kernels)
