"""Speculative decoding: draft tokens behind a sequence's last one, all checked by the model in one step.

Ints only. A proposer may be wrong and never changes a token: the engine keeps those that the model would have chosen,
and a rejection costs time alone. How many are tried follows from how many were accepted and how long steps took
(step_cost.py). The proposer of this file is prompt lookup: Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Protocol

from tinyserve.errors import UserError
from tinyserve.scheduling.sequence import Sequence
from tinyserve.scheduling.step_cost import EMA, StepCostModel, best_draft_length, draft_costs

MAX_DRAFTING_SEQS = 8  # sequences with draft tokens in a step; each needs a rollback slot where models have states
MAX_DRAFT_TOKENS = 64  # the most that `num_speculative_tokens` can be
MAX_FORCED_TOKENS = 16  # draft tokens that a grammar allows no alternative to, such as the keys of an object
FORCED_ACCEPTANCE = 0.9  # of those, before any was checked
NGRAM_ACCEPTANCE = (0.15, 0.35, 0.5, 0.65, 0.72, 0.78)  # behind a match of 1, 2, ... tokens, before any was checked


class Proposer(Protocol):
    """Who drafts. It may keep what it likes about a sequence until the sequence is removed."""

    def propose(self, sequences: list[Sequence], max_draft_lens: list[int]) -> list[list[int]]:
        """Draft tokens for each of those that decode in this step, at most so many; often none."""

    def update_acceptance(self, sequence: Sequence, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """So many of a sequence's draft tokens were checked, and so many of them, from the first on, accepted."""

    def record_step(self, num_tokens: int, seconds: float) -> None:
        """The model's step of so many tokens, draft tokens among them, took so long, without what `propose` took."""

    def remove(self, sequence: Sequence) -> None:
        """A sequence does not run any more; it may come back."""


@dataclass
class _NgramIndex:
    """Where each n-gram of a sequence ended last, and how often the text went on as behind one of each length."""

    acceptance: dict[int, EMA]
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    length: int = 0  # tokens whose n-grams are in it


class NgramProposer:
    """Prompt lookup: drafts what followed where the last `min_ngram` to `max_ngram` tokens stood before.

    What it would have drafted is compared with what came whether it was tried or not, so that nothing is tried to
    find out.
    """

    def __init__(self, num_tokens: int, max_ngram: int, min_ngram: int):
        self.num_tokens, self.max_ngram, self.min_ngram = num_tokens, max_ngram, min_ngram
        self.step_cost = StepCostModel()
        self._indices: dict[Sequence, _NgramIndex] = {}

    def propose(self, sequences: list[Sequence], max_draft_lens: list[int]) -> list[list[int]]:
        drafts, num_tokens = [], len(sequences)
        token_seconds = self.step_cost.predict(num_tokens) / max(1, num_tokens)
        for sequence, max_draft_len in zip(sequences, max_draft_lens, strict=True):
            costs = draft_costs(self.step_cost, num_tokens, token_seconds)
            drafts.append(self._draft(sequence, max_draft_len, costs))
            num_tokens += len(drafts[-1])
        return drafts

    def update_acceptance(self, sequence: Sequence, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """The text itself tells."""

    def record_step(self, num_tokens: int, seconds: float) -> None:
        self.step_cost.record_step(num_tokens, seconds)

    def remove(self, sequence: Sequence) -> None:
        self._indices.pop(sequence, None)

    def _draft(self, sequence: Sequence, max_draft_len: int, costs: Iterable[float]) -> list[int]:
        tokens, index = sequence.token_ids, self._update_index(sequence)
        n, end = self._find(index, tokens, len(tokens))
        if not n:
            return []
        # With each draft token that is accepted the match is one token longer.
        most = min(max_draft_len, self.num_tokens)
        acceptance = (index.acceptance[min(n + i, self.max_ngram)].value for i in range(most))
        draft: list[int] = []
        for i in range(end, end + best_draft_length(acceptance, costs)):  # past the end of the text, round and round
            draft.append(tokens[i] if i < len(tokens) else draft[i - len(tokens)])
        return draft

    def _update_index(self, sequence: Sequence) -> _NgramIndex:
        """A sequence's n-grams but the last ones, which nothing has followed yet."""
        index, tokens = self._indices.get(sequence), sequence.token_ids
        if index is None:
            priors = {n: NGRAM_ACCEPTANCE[min(n, len(NGRAM_ACCEPTANCE)) - 1] for n in range(1, self.max_ngram + 1)}
            index = self._indices[sequence] = _NgramIndex({n: EMA(prior) for n, prior in priors.items()})
        for end in range(max(index.length, 1), len(tokens)):
            if index.length:  # the beginning, which is mostly a prompt, says little about the answer
                n, before = self._find(index, tokens, end)
                if n:
                    index.acceptance[n].update(tokens[before] == tokens[end])
            for n in range(self.min_ngram, min(self.max_ngram, end) + 1):
                index.ends[tuple(tokens[end - n : end])] = end
        index.length = len(tokens)
        return index

    def _find(self, index: _NgramIndex, tokens: list[int], end: int) -> tuple[int, int]:
        """How many of the tokens up to `end` stood before, and where they ended last; 0 where too few did."""
        for n in range(min(self.max_ngram, end - 1), self.min_ngram - 1, -1):
            before = index.ends.get(tuple(tokens[end - n : end]))
            if before is not None:
                return n, before
        return 0, 0


class Speculation:
    """Draft tokens of a proposer, or those that a grammar leaves no alternative to.

    How many tokens, blocks and slots a step has for them is the scheduler's to say.
    """

    def __init__(self, proposer: Proposer, rollback_slots: SequenceOf[int] | None = None):
        """`rollback_slots` hold states while draft tokens are checked; None where a model has no states."""
        self.proposer, self.rollback_slots = proposer, rollback_slots
        self._propose_seconds = 0.0  # in this step
        self._forced_acceptance: dict[Sequence, EMA] = {}
        self._forced: set[Sequence] = set()  # whose draft tokens of this step come from their grammar

    def propose(self, sequences: list[Sequence], max_draft_lens: list[int]) -> list[list[int]]:
        """Draft tokens for each sequence, at most so many, that its grammar allows; call it once a step."""
        self._propose_seconds = 0.0
        self._forced.clear()
        if not sequences:
            return []
        start = perf_counter()
        drafts = self.proposer.propose(sequences, max_draft_lens)
        self._propose_seconds = perf_counter() - start
        return [
            draft if sequence.matcher is None else self._structured(sequence, draft, max_draft_len)
            for sequence, draft, max_draft_len in zip(sequences, drafts, max_draft_lens, strict=True)
        ]

    def update_acceptance(self, sequence: Sequence, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """So many of a sequence's draft tokens were checked, and so many of them, from the first on, accepted."""
        if sequence in self._forced:
            self._forced_acceptance[sequence].update_acceptance(num_draft_tokens, num_accepted_tokens)
        else:
            self.proposer.update_acceptance(sequence, num_draft_tokens, num_accepted_tokens)

    def record_step(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long, with the time for its draft tokens."""
        self.proposer.record_step(num_tokens, seconds - self._propose_seconds)

    def remove(self, sequence: Sequence) -> None:
        """A sequence does not run any more."""
        self._forced_acceptance.pop(sequence, None)
        self.proposer.remove(sequence)

    def _structured(self, sequence: Sequence, draft: list[int], max_draft_len: int) -> list[int]:
        """The draft tokens that the grammar allows; or those it forces, where they are more and mostly accepted.

        They may be rejected: the model may spell the same text with other tokens than the tokenizer.
        """
        draft = draft[: sequence.matcher.count_valid(draft)]
        forced = sequence.matcher.forced_tokens()[: min(max_draft_len, MAX_FORCED_TOKENS)]
        if len(forced) <= len(draft):
            return draft
        if self._forced_acceptance.setdefault(sequence, EMA(FORCED_ACCEPTANCE)).value <= 0.5:
            return draft
        self._forced.add(sequence)
        return list(forced)


DRAFT_MODEL_TOKENS = 6  # that a draft model proposes, unless told otherwise: each costs a step of its own


@dataclass(frozen=True)
class SpeculativeConfig:
    """How to speculate, under vLLM's names; `dtype` is the draft model's, None is that of the model itself."""

    method: str = "ngram"
    num_speculative_tokens: int = 11
    prompt_lookup_max: int = 6
    prompt_lookup_min: int = 1
    model: str = ""
    dtype: str | None = None

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> "SpeculativeConfig | None":
        """What a `speculative_config` asks for; raises UserError."""
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise UserError(f"speculative_config is {given!r:.200}; it is a mapping with {', '.join(_OF['ngram'])}.")
        method = given.get("method", "draft_model" if "model" in given else "ngram")
        if method not in _OF:
            raise UserError(f"speculative_config: method is {method!r}; there are {' and '.join(_OF)}.")
        if unknown := [name for name in given if name not in _OF[method]]:
            raise UserError(
                f"speculative_config has {unknown[0]!r}; with the method {method} it has {', '.join(_OF[method])}."
            )
        default = cls() if method == "ngram" else cls(method, num_speculative_tokens=DRAFT_MODEL_TOKENS)
        config = replace(default, **given)
        config._check()
        return config

    def _check(self) -> None:
        for name in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_DRAFT_TOKENS:
                raise UserError(
                    f"speculative_config: {name} is {value!r}; it must be a whole number from 1 to {MAX_DRAFT_TOKENS}."
                )
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise UserError(
                f"speculative_config: prompt_lookup_min is {self.prompt_lookup_min} and prompt_lookup_max "
                f"{self.prompt_lookup_max}: the one cannot be above the other."
            )
        if self.method == "draft_model" and not (self.model and isinstance(self.model, str)):
            raise UserError(
                f"speculative_config: model is {self.model!r}; with the method draft_model it names a smaller model "
                "with the same vocabulary: a preset, a repo id, a folder or a .gguf file."
            )


_OF = {
    "ngram": ("method", "num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"),
    "draft_model": ("method", "model", "num_speculative_tokens", "dtype"),
}
