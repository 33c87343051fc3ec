"""One request on its way through the engine: its tokens, its blocks, its clock. Ints and plain data only."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

from tinyserve.sampling_params import SamplingParams
from tinyserve.scheduling.block_manager import ROOT


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
    token_times: list[float] = field(default_factory=list)  # of each token of the answer
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


@dataclass(eq=False)
class Sequence:
    """A prompt and the tokens that have followed it; the engine moves it from waiting to running to finished."""

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0  # lower is earlier
    token_ids: list[int] = field(init=False)
    seed: int = field(init=False)  # what it draws is a function of this and of how many tokens it has drawn
    num_computed: int = 0  # tokens whose keys and values are in the cache
    block_table: list[int] = field(default_factory=list)
    state_slot: int = -1  # while it runs: which row of the recurrent layers' memory is its own
    num_recorded: int = 0  # full blocks that the prefix cache knows, and the key of the last
    key: int = ROOT
    draft: list[int] = field(default_factory=list)  # guesses that the next step checks
    spare_slot: int | None = None  # where its state is kept meanwhile
    num_delivered: int = 0  # tokens of the answer that were handed over
    split_at: int = 0  # a chunk of its prompt ends here, if that is ahead
    last_snapshot: int = 0  # the prefix cache has kept a state as of here
    forks: "list[Sequence]" = field(default_factory=list)  # other answers: they wait for this one's prompt
    logprobs: list[Logprobs] = field(default_factory=list)
    prompt_logprobs: list[Logprobs | None] = field(default_factory=lambda: [None])  # nothing is before the first token
    bad_words: list[list[int]] = field(default_factory=list)  # tokens that do not come one after the other
    matcher: Any = None  # which tokens its grammar allows: the runner's business
    finish_reason: str | None = None
    error: str | None = None
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
    def place(self) -> tuple[int, int]:
        """Its place in the queue: by priority, then first come first served."""
        return self.priority, self.request_id

    @property
    def is_running(self) -> bool:
        return self.state_slot >= 0

    def stop_running(self) -> None:
        """Forget everything about the cache: whoever runs it again starts from its token ids."""
        self.block_table, self.state_slot, self.num_computed = [], -1, 0
        self.draft, self.spare_slot = [], None
        self.num_recorded, self.key, self.split_at, self.last_snapshot = 0, ROOT, 0, 0

    def append(self, token: int, logprobs: Logprobs | None) -> None:
        """Take in the next token, and note the time."""
        self.token_ids.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        self.metrics.token_times.append(perf_counter())


class Sampled(NamedTuple):
    """What a runner returns for a sequence whose newest token it computed."""

    token_id: int
    logprobs: Logprobs | None = None
    error: str | None = None  # why there is no token: this request fails, and no other
    then: tuple["Sampled", ...] = ()  # what follows it, where the guesses were right up to there


class Scheduled(NamedTuple):
    """A sequence, and how many of its tokens the next step computes."""

    sequence: Sequence
    num_tokens: int
