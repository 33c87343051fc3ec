"""One request on its way through the engine: its tokens, what it holds of the cache, its times. Plain data only."""

import os
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

from tinyserve.sampling_params import SamplingParams
from tinyserve.scheduling.block_manager import ROOT_PREFIX


class Logprob(float):
    """A natural log-probability, as a number; `rank` 1 is the likeliest token, `decoded_token` its text."""

    __slots__ = ("decoded_token", "rank")
    decoded_token: str | None
    rank: int

    def __new__(cls, value: float, rank: int, decoded_token: str | None = None) -> "Logprob":
        """Under vLLM's names, so that `.logprob` is the number as well."""
        new = super().__new__(cls, value)
        new.rank, new.decoded_token = rank, decoded_token
        return new

    @property
    def logprob(self) -> float:
        """The number itself."""
        return float(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Logprob, (float(self), self.rank, self.decoded_token)


Logprobs = Mapping[int, Logprob]  # of some tokens at one position, the likeliest first


@dataclass
class Metrics:
    """When things happened to a request, in seconds of one clock, and what they amount to."""

    arrival: float = field(default_factory=perf_counter)
    first_scheduled: float | None = None
    token_times: list[float] = field(default_factory=list, repr=False)  # of each token of the answer
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt: they were in the cache and not computed
    preemptions: int = 0  # how often it had to give up its blocks

    @property
    def output_tokens(self) -> int:
        """How many tokens the answer has."""
        return len(self.token_times)

    @property
    def first_token(self) -> float | None:
        """When the first token came."""
        return self.token_times[0] if self.token_times else None

    @property
    def last_token(self) -> float | None:
        """When the last token came."""
        return self.token_times[-1] if self.token_times else None

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival to being scheduled."""
        return None if self.first_scheduled is None else self.first_scheduled - self.arrival

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prompt tokens that were computed, by the time from being scheduled to the first token."""
        if self.first_token is None or self.first_scheduled is None:
            return None
        return (self.prompt_tokens - self.cached_tokens) / max(1e-9, self.first_token - self.first_scheduled)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first by the time they took; None for answers of one token."""
        if self.first_token is None or self.last_token is None or self.output_tokens < 2:
            return None
        return (self.output_tokens - 1) / max(1e-9, self.last_token - self.first_token)


@dataclass
class CacheState:
    """What a sequence holds of the cache while it runs; the scheduler replaces all of it when it stops running."""

    block_table: list[int] = field(default_factory=list)  # its blocks of the KV cache, in the order of its tokens
    state_slot: int = -1  # its row of the recurrent layers' states; -1 when it does not run
    num_computed: int = 0  # tokens whose keys, values and state are in the cache
    num_cached_blocks: int = 0  # full blocks that the prefix cache knows
    prefix_id: int = ROOT_PREFIX  # the prefix cache's id for the tokens of those blocks
    chunk_boundary: int = 0  # prefill ends a chunk here, for a snapshot; no effect once passed
    last_snapshot: int = 0  # the prefix cache has a snapshot of the state after this many tokens


@dataclass(eq=False)
class Sequence:
    """A prompt and the tokens that have followed it: waiting, running or finished."""

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0  # lower is earlier
    token_ids: list[int] = field(init=False)
    seed: int = field(init=False)  # what it draws is a function of this and of how many tokens it has drawn
    cache: CacheState = field(default_factory=CacheState)
    # The other answers to its prompt (n > 1), until they share its blocks (copy on write).
    siblings: "list[Sequence]" = field(default_factory=list)
    num_delivered: int = 0  # tokens of the answer that were handed over
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] = field(default_factory=lambda: [None])  # nothing is before the first token
    bad_words: list[list[int]] = field(default_factory=list)  # token sequences that must not be generated
    matcher: Any = None  # its grammar's state, a text/grammar.py Matcher
    finish_reason: str | None = None
    error: str | None = None
    is_request_error: bool = False
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.seed = int.from_bytes(os.urandom(8), "little") if self.params.seed is None else self.params.seed
        self.metrics.prompt_tokens = len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens after the prompt."""
        return self.token_ids[len(self.prompt_token_ids) :]

    @property
    def num_output(self) -> int:
        """How many tokens there are after the prompt."""
        return len(self.token_ids) - len(self.prompt_token_ids)

    @property
    def num_uncomputed(self) -> int:
        """How many of its tokens are not in the cache."""
        return len(self.token_ids) - self.cache.num_computed

    @property
    def is_running(self) -> bool:
        return self.cache.state_slot >= 0

    def append(self, token: int, logprobs: Logprobs | None) -> None:
        """Take in the next token, and note the time."""
        self.token_ids.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self.metrics.token_times.append(perf_counter())


@dataclass(eq=False)
class PrefillOnlySequence:
    """A text that is only read (embeddings, logits): prefill without an answer."""

    token_ids: list[int]
    cache: CacheState


class Scheduled(NamedTuple):
    """A sequence's share of the next step."""

    sequence: Sequence
    num_tokens: int  # how many of its tokens are computed
    draft_tokens: SequenceOf[int] = ()  # checked behind them (speculative decoding)
    rollback_slot: int | None = None  # holds a copy of the recurrent state, in case a draft token is rejected

    @property
    def token_ids(self) -> list[int]:
        """All that the step computes of it, draft tokens among them."""
        start = self.sequence.cache.num_computed
        return [*self.sequence.token_ids[start : start + self.num_tokens], *self.draft_tokens]

    @property
    def is_complete(self) -> bool:
        """Whether this step computes its last token, so that the next one is sampled."""
        return self.num_tokens == self.sequence.num_uncomputed


class Sampled(NamedTuple):
    """A token that a runner chose."""

    token_id: int
    logprobs: Logprobs | None = None
    error: str | None = None  # why there is no token: this request fails, and no other
    is_request_error: bool = False  # that is by what the request asks for, not by the model
