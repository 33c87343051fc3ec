"""Guesses of a smaller model: each is the beginning of a request to an engine of its own.

Ints only, like that engine. What it has computed of a text stays in its prefix cache, and a request goes on from there:
behind guesses that were right, or where they parted from what came. So there is nothing to wind back, and nothing to
tell it of sequences that end, fork or are preempted. Leviathan et al. 2023, arXiv:2211.17192.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count, repeat
from time import perf_counter

from tinyserve.engine import Engine
from tinyserve.sampling_params import SamplingParams
from tinyserve.scheduling.sequence import Sequence
from tinyserve.scheduling.speculative import MOST_ROWS, Average, StepTimes, extra_costs, most_useful

PAUSES = (8, 32)  # steps without a guess, when none pays, before some are tried again; then no more
FOREVER = 1 << 62
TRIED = 2  # guesses, to see whether they are better by now
SWEPT = 1.2  # what guesses cost beyond what was measured: each model's weights push the other's out of the caches
CURIOSITY = 8  # of so many requests one is tried where those before it say that none pays


@dataclass
class _Pace:
    """How a sequence's guesses fare."""

    chance: Average
    is_tried: bool = False
    has_waited: bool = False
    waits: int = 0  # steps
    pauses: Iterator[int] = field(default_factory=lambda: iter(PAUSES))


class DraftModel:
    """Guesses as a smaller model goes on, greedily or with the request's own random numbers, structure and penalties.

    All sequences share each of its steps. It reads a prompt when the answer has begun, a step's worth at a time.
    """

    def __init__(self, engine: Engine, num_tokens: int):
        self.engine, self.num_tokens = engine, num_tokens
        self.times, self.own_times = StepTimes(), StepTimes()
        self._overall = Average(0.75)
        self._paces: dict[Sequence, _Pace] = {}
        self._params: dict[Sequence, SamplingParams] = {}
        self._ids, self._requests = count(), count(1)

    def propose(self, sequences: list[Sequence], rooms: list[int]) -> list[list[int]]:
        wanted = {}
        for sequence, room in zip(sequences, rooms, strict=True):
            room = min(room, self.num_tokens, self._room(sequence))
            if room > 0 and (num_tokens := self._worth(sequence, room, len(sequences))):
                wanted[sequence] = num_tokens
        drafts = {sequence: self._begin(sequence) for sequence in wanted}
        try:
            for draft in drafts.values():
                self.engine.submit(draft)
            while self.engine.has_work() and self._step():
                for sequence, num_tokens in wanted.items():
                    self._go_on_or_end(drafts[sequence], len(sequence.token_ids), num_tokens)
        finally:
            for draft in drafts.values():
                self.engine.finish(draft, "abort")
        return [drafts[s].token_ids[len(s.token_ids) :] if s in drafts else [] for s in sequences]

    def _go_on_or_end(self, draft: Sequence, length: int, num_tokens: int) -> None:
        """After a step of one that is to guess so many tokens behind a text of this length."""
        has_enough = len(draft.token_ids) - length >= num_tokens
        # Who reads a long prompt has had its step, and goes on from there another time.
        if has_enough or len(draft.token_ids) - draft.num_computed > MOST_ROWS:
            self.engine.finish(draft, "abort")
        elif draft.num_computed == length:  # where the next comes back to if the first guess is wrong
            self.engine.prefixes.keep_place(draft, self.engine.runner.copy_state)

    def learn(self, sequence: Sequence, guessed: int, right: int) -> None:
        chance = self._pace(sequence).chance
        for is_right in [True] * right + [False] * (right < guessed):
            chance.note(is_right)
            self._overall.note(is_right)

    def measure(self, rows: int, seconds: float) -> None:
        self.times.note(rows, seconds)

    def forget(self, sequence: Sequence) -> None:
        self._paces.pop(sequence, None)
        self._params.pop(sequence, None)

    def _room(self, sequence: Sequence) -> int:
        """How many guesses fit into its context and its cache."""
        blocks = self.engine.blocks
        return min(self.engine.max_model_len, blocks.num_blocks * blocks.block_size) - len(sequence.token_ids)

    def _step(self) -> bool:
        """Whether there was anything to do."""
        start = perf_counter()
        self.engine.step()
        rows = sum(num_tokens for _, num_tokens in self.engine.scheduled)
        if rows:
            self.own_times.note(rows, perf_counter() - start)
        return rows > 0

    def _begin(self, sequence: Sequence) -> Sequence:
        """A request that stands where a sequence does, and draws the numbers that it will draw."""
        params = self._params.get(sequence)
        if params is None:
            params = replace(sequence.params, n=1, best_of=None, logprobs=None, prompt_logprobs=None)
            self._params[sequence] = params
        draft = Sequence(next(self._ids), sequence.prompt_token_ids, params)
        draft.token_ids, draft.seed = list(sequence.token_ids), sequence.seed
        draft.matcher, draft.bad_words = sequence.matcher and sequence.matcher.copy(), sequence.bad_words
        return draft

    # --- whether it pays ----------------------------------------------------------------------------------------

    def _pace(self, sequence: Sequence) -> _Pace:
        pace = self._paces.get(sequence)
        if pace is None:
            pace = self._paces[sequence] = _Pace(Average(self._overall.value))
        return pace

    def _worth(self, sequence: Sequence, room: int, together: int) -> int:
        """How many guesses pay beside those of so many sequences; or a few now and then, where none does."""
        pace = self._pace(sequence)
        if pace.waits:
            pace.waits -= 1
            return 0
        # All share a step of the draft model, and each guess is a token more of the model's own.
        step = self.times.seconds(together)
        draft_step = self.own_times.seconds(together) / step if step else 0.25
        extra = extra_costs(self.times, together, step / together)
        costs = (SWEPT * (cost + draft_step * (i + 1)) for i, cost in enumerate(extra))
        if num_tokens := most_useful(repeat(pace.chance.value, room), costs):
            pace.is_tried = True
            return num_tokens
        if not pace.is_tried and next(self._requests) % CURIOSITY:
            pace.waits = FOREVER
            return 0
        num_tokens = min(TRIED, room) if pace.has_waited else 0
        pace.is_tried = pace.has_waited = True
        pace.waits = next(pace.pauses, FOREVER)
        return num_tokens
