"""Draft tokens of a smaller model: each draft is the beginning of a request to an engine of its own.

Ints only, like that engine. What it has computed of a text stays in its prefix cache, and a request goes on from there:
behind draft tokens that were accepted, or where the text parted from them. So there is nothing to roll back, and
nothing to tell it of sequences that end, share a prompt or are preempted. Leviathan et al. 2023, arXiv:2211.17192.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count, repeat
from time import perf_counter
from typing import Protocol

from tinyserve.sampling_params import SamplingParams
from tinyserve.scheduling.scheduler import Scheduler
from tinyserve.scheduling.sequence import Sequence
from tinyserve.scheduling.step_cost import EMA, MAX_SAMPLE_TOKENS, StepCostModel, best_draft_length, draft_costs

RETRY_AFTER_STEPS = (8, 32)  # of a sequence for which no draft pays, one after the other; then never again
RETRY_DRAFT_TOKENS = 2  # of such a retry
NEVER = 1 << 62  # steps
PROBE_ONE_IN = 8  # requests of which one is tried where those before it say that no draft pays
CACHE_CONTENTION = (
    1.2  # the cost of drafts by what was measured: each model's weights evict the other's from the caches
)
ACCEPTANCE = 0.75  # of a draft token, before any was checked
DRAFT_STEP_COST = 0.25  # of a step of the draft model by one of the target's, before any was measured


class DraftEngine(Protocol):
    """What is asked of the draft model's engine."""

    scheduler: Scheduler

    def submit(self, sequence: Sequence, /) -> None: ...

    def has_work(self) -> bool: ...

    def step(self) -> list[Sequence]: ...

    def finish(self, sequence: Sequence, reason: str, /) -> None: ...


@dataclass
class _Acceptance:
    """How a sequence's draft tokens fare, and when the next are tried where none pays."""

    rate: EMA
    was_tried: bool = False
    has_paused: bool = False
    steps_to_wait: int = 0
    pauses: Iterator[int] = field(default_factory=lambda: iter(RETRY_AFTER_STEPS))


class DraftModel:
    """Drafts as a smaller model goes on, greedily or with the request's own random numbers, grammar and penalties.

    All sequences share each of its steps. It prefills a prompt when the answer has begun, a chunk at a time.
    """

    def __init__(self, engine: DraftEngine, num_tokens: int):
        """`num_tokens`: the longest draft."""
        self.engine, self.num_tokens = engine, num_tokens
        self.target_cost, self.draft_cost = StepCostModel(), StepCostModel()
        self._overall = EMA(ACCEPTANCE)
        self._acceptance: dict[Sequence, _Acceptance] = {}
        self._params: dict[Sequence, SamplingParams] = {}
        self._ids, self._requests = count(), count(1)

    def propose(self, sequences: list[Sequence], max_draft_lens: list[int]) -> list[list[int]]:
        lengths = {}
        for sequence, max_draft_len in zip(sequences, max_draft_lens, strict=True):
            most = min(max_draft_len, self.num_tokens, self._context_left(sequence))
            if most > 0 and (length := self._draft_length(sequence, most, len(sequences))):
                lengths[sequence] = length
        drafts = {sequence: self._draft_request(sequence) for sequence in lengths}
        try:
            for draft in drafts.values():
                self.engine.submit(draft)
            while self.engine.has_work() and self._step():
                for sequence, length in lengths.items():
                    self._continue_or_finish(drafts[sequence], len(sequence.token_ids), length)
        finally:
            for draft in drafts.values():
                self.engine.finish(draft, "abort")
        return [drafts[s].token_ids[len(s.token_ids) :] if s in drafts else [] for s in sequences]

    def update_acceptance(self, sequence: Sequence, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        for rate in (self._acceptance_of(sequence).rate, self._overall):
            rate.update_acceptance(num_draft_tokens, num_accepted_tokens)

    def record_step(self, num_tokens: int, seconds: float) -> None:
        self.target_cost.record_step(num_tokens, seconds)

    def remove(self, sequence: Sequence) -> None:
        self._acceptance.pop(sequence, None)
        self._params.pop(sequence, None)

    # --- drafting -----------------------------------------------------------------------------------------------

    def _draft_request(self, sequence: Sequence) -> Sequence:
        """A request that stands where a sequence does, and draws the random numbers that it will draw."""
        params = self._params.get(sequence)
        if params is None:
            params = replace(sequence.params, n=1, best_of=None, logprobs=None, prompt_logprobs=None)
            self._params[sequence] = params
        draft = Sequence(next(self._ids), sequence.prompt_token_ids, params)
        draft.token_ids, draft.seed = list(sequence.token_ids), sequence.seed
        draft.matcher, draft.bad_words = sequence.matcher and sequence.matcher.copy(), sequence.bad_words
        return draft

    def _step(self) -> bool:
        """Whether there was anything to do."""
        start = perf_counter()
        self.engine.step()
        num_tokens = sum(work.num_tokens for work in self.engine.scheduler.scheduled)
        if num_tokens:
            self.draft_cost.record_step(num_tokens, perf_counter() - start)
        return num_tokens > 0

    def _continue_or_finish(self, draft: Sequence, length: int, num_tokens: int) -> None:
        """After a step of a request that drafts so many tokens behind a text of this length."""
        has_enough = len(draft.token_ids) - length >= num_tokens
        # One that prefills a long prompt has had its chunk, and goes on from there another time.
        if has_enough or draft.num_uncomputed > MAX_SAMPLE_TOKENS:
            self.engine.finish(draft, "abort")
        elif draft.cache.num_computed == length:  # the next draft starts here if the first token of this is rejected
            self.engine.scheduler.take_snapshot(draft)

    def _context_left(self, sequence: Sequence) -> int:
        """How many draft tokens fit into the draft model's context and cache."""
        scheduler = self.engine.scheduler
        tokens = scheduler.blocks.num_blocks * scheduler.blocks.block_size
        return min(scheduler.max_model_len, tokens) - len(sequence.token_ids)

    # --- whether it pays ----------------------------------------------------------------------------------------

    def _acceptance_of(self, sequence: Sequence) -> _Acceptance:
        acceptance = self._acceptance.get(sequence)
        if acceptance is None:
            acceptance = self._acceptance[sequence] = _Acceptance(EMA(self._overall.value))
        return acceptance

    def _draft_length(self, sequence: Sequence, most: int, num_sequences: int) -> int:
        """How many draft tokens pay beside those of so many sequences; or a few now and then, where none does."""
        acceptance = self._acceptance_of(sequence)
        if acceptance.steps_to_wait:
            acceptance.steps_to_wait -= 1
            return 0
        # All share a step of the draft model, and each draft token is a token more of the target's own.
        step = self.target_cost.predict(num_sequences)
        draft_step = self.draft_cost.predict(num_sequences) / step if step else DRAFT_STEP_COST
        target = draft_costs(self.target_cost, num_sequences, step / num_sequences)
        costs = (CACHE_CONTENTION * (cost + draft_step * (i + 1)) for i, cost in enumerate(target))
        if length := best_draft_length(repeat(acceptance.rate.value, most), costs):
            acceptance.was_tried = True
            return length
        if not acceptance.was_tried and next(self._requests) % PROBE_ONE_IN:
            acceptance.steps_to_wait = NEVER
            return 0
        length = min(RETRY_DRAFT_TOKENS, most) if acceptance.has_paused else 0
        acceptance.was_tried = acceptance.has_paused = True
        acceptance.steps_to_wait = next(acceptance.pauses, NEVER)
        return length
