"""How fast a model is here, and how near to what this machine can do: works, repeated, as plain numbers.

Knows the Python API, what a step has to read and multiply, and the limits that tensor/limits.py measures. What of it
fits into some seconds is planned in bench_budget.py. What a peer does with the same file is measured by
scripts/bench_peers.py.
"""

import math
import statistics
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tinyserve.engine_options import EngineOptions
from tinyserve.errors import UserError
from tinyserve.models.config import ModelConfig
from tinyserve.models.config.costs import (
    attention_flops_per_position,
    matmul_flops_per_token,
    state_bytes_per_sequence,
    weight_bytes,
    weight_bytes_per_token,
)
from tinyserve.models.dtypes import WEIGHT_DTYPES, resolve_kv_cache_dtype
from tinyserve.progress import Progress, silent, size
from tinyserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tinyserve.llm import LLM
    from tinyserve.models.cache_plan import CacheNeeds

PREFILL, DEPTHS, BATCHES, DECODE, REPETITIONS = (128, 512, 2048), (0, 512, 4096), (1, 8, 32), 32, 5
QUICK_PREFILL, QUICK_DEPTHS, QUICK_BATCHES, QUICK_REPETITIONS = (512,), (0,), (1,), 3
STEP, BLOCK = EngineOptions().max_num_batched_tokens, EngineOptions().block_size
MOST_SEQUENCES = STEP // 2  # more would leave no room in a step for prompts
PROBES, PROBE_STEPS, LONG_PROBE = (16, 64), 4, 1.0  # tokens of prompts; decoded after each; seconds, the last then


@dataclass(frozen=True)
class Work:
    """Reading a prompt of `tokens`, or decoding `tokens` for each of `batch` sequences that are `depth` tokens long."""

    kind: str  # "prefill" or "decode"
    tokens: int
    depth: int = 0
    batch: int = 1

    def __str__(self) -> str:
        if self.kind == "prefill":
            return f"prefill of {self.tokens} tokens"
        return f"decode at depth {self.depth}, batch {self.batch}"

    @property
    def prompt(self) -> int:
        """The tokens of each prompt: nothing is decoded after none."""
        return self.tokens if self.kind == "prefill" else max(1, self.depth)

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Where it stands among others, whatever a decode's tokens: prompts first, short ones before long ones."""
        return (self.kind != "prefill", 0 if self.kind == "decode" else self.tokens, self.depth, self.batch)

    def most_tokens(self, repetitions: int) -> int:
        """What each sequence can come to."""
        if self.kind == "prefill":
            return self.prompt + 1
        # While the last prompts are read, the first sequences are decoding already.
        meanwhile = self.prompt * self.batch // (STEP - self.batch) + 1
        return self.prompt + meanwhile + self.stretches(repetitions) * self.tokens + 1

    def stretches(self, repetitions: int) -> int:
        """Repetitions, and one that is not counted, that follow one reading of the prompts; without depth, just one."""
        return repetitions + 1 if self.depth else 1


@dataclass(frozen=True)
class Job:
    """A work, how often it is counted, and whether one repetition goes before those."""

    work: Work
    repetitions: int
    warm_up: bool = True

    @property
    def runs(self) -> int:
        """All repetitions, counted or not."""
        return self.repetitions + self.warm_up


def works(prefill: Sequence[int], depths: Sequence[int], batches: Sequence[int], decode: int) -> list[Work]:
    """Prefill of each length, then decoding `decode` tokens at each depth for each number of sequences."""
    return [Work("prefill", length) for length in prefill] + [
        Work("decode", decode, depth, batch) for depth in depths for batch in batches
    ]


def left_out(wanted: Sequence[Work], done: Sequence[Work]) -> list[Work]:
    """Works that were not done; a decode of fewer tokens stands for the one that was wanted."""
    places = {work.place for work in done}
    return [work for work in wanted if work.place not in places]


# --- what fits --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Skipped:
    """A work that is not done, and why."""

    work: Work
    reason: str
    by_context: bool


@dataclass(frozen=True)
class Plan:
    """Works that fit, works that do not, and the options of an LLM that has room for the first."""

    works: list[Work]
    skipped: list[Skipped]
    options: dict[str, int]


def plan(
    config: ModelConfig, dtype: str, wanted: Sequence[Work], repetitions: int, memory: int, synthetic: bool = False
) -> Plan:
    """Sort works into those that the model's context and `memory` bytes hold, and those that they do not.

    Like an LLM by itself, takes at most half of what the weights leave free for keys and values. Raises UserError for
    synthetic weights that take more than that memory; a file's may be fewer bits than `dtype` has.
    """
    weights = weight_bytes(config, dtype)
    if synthetic and weights > memory:
        raise UserError(
            f"The weights take {size(weights)} in {dtype}, and {size(memory)} of memory are free: take "
            f"--dtype {'int4' if WEIGHT_DTYPES[dtype].is_integer else 'int8 or int4'}, or a smaller model."
        )
    budget = max(0, memory - weights) // 2
    fitting, skipped = [], []
    for work in wanted:
        tokens = work.most_tokens(repetitions)
        need = _cache_bytes(config, dtype, work, repetitions) + _state_bytes(config, dtype, [work])
        if tokens > config.max_position_embeddings:
            reason = f"{work} comes to {tokens} tokens, and the context holds {config.max_position_embeddings}"
            skipped.append(Skipped(work, reason, by_context=True))
        elif need > budget:
            kept = "keys, values and states" if config.state_shapes else "keys and values"
            reason = f"{work} takes {size(need)} of {kept}, and there is room for {size(budget)}"
            skipped.append(Skipped(work, reason, by_context=False))
        else:
            fitting.append(work)
    if not fitting:
        return Plan([], skipped, {})
    options = {
        "max_num_seqs": max(work.batch for work in fitting),
        "max_model_len": max(2, *(work.most_tokens(repetitions) for work in fitting)),
        "kv_cache_memory": max(_cache_bytes(config, dtype, work, repetitions) for work in fitting)
        + _state_bytes(config, dtype, fitting),
        "max_num_batched_tokens": STEP,
        "block_size": BLOCK,
        "enable_prefix_caching": False,  # what is measured is computed
    }
    return Plan(fitting, skipped, options)


def _cache_bytes(config: ModelConfig, dtype: str, work: Work, repetitions: int) -> int:
    """Keys and values of a work's sequences."""
    blocks = work.batch * math.ceil(work.most_tokens(repetitions) / BLOCK)
    return blocks * _needs(config, dtype, work.batch).block_nbytes


def _state_bytes(config: ModelConfig, dtype: str, works: Sequence[Work]) -> int:
    """States of as many sequences as the largest batch has."""
    return _needs(config, dtype, max(work.batch for work in works)).without_blocks().nbytes


def _needs(config: ModelConfig, dtype: str, max_num_seqs: int) -> "CacheNeeds":
    from tinyserve.models.cache_plan import CacheNeeds

    return CacheNeeds(config, dtype, resolve_kv_cache_dtype("auto", dtype), BLOCK, max_num_seqs)


# --- what it costs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What has to be done at least: bytes read from memory; operations, a multiplication and an addition being two."""

    bytes: float
    operations: float


def decode_cost(config: ModelConfig, weights: float, kv: float, batch: int, context: float) -> Cost:
    """One step for `batch` sequences that look at `context` tokens each.

    `weights` are the bytes that a step reads of them, whatever the batch; `kv` those of a token's keys and values. A
    recurrent state is read and written.
    """
    seen = min(context, config.attention_window or math.inf)
    per_token = matmul_flops_per_token(config) + seen * attention_flops_per_position(config)
    return Cost(weights + batch * (seen * kv + 2 * state_bytes_per_sequence(config)), batch * per_token)


def prefill_cost(config: ModelConfig, weights: float, kv: float, tokens: int, step: int = STEP) -> Cost:
    """A prompt of `tokens`, `step` at a time: all weights each time, and the head for the last token only."""
    window = config.attention_window or math.inf
    head = 2 * config.vocab_size * config.hidden_size
    seen = min(tokens, config.attention_window or tokens)  # by the last token; those before it see up to as many
    pairs = seen * (seen + 1) // 2 + (tokens - seen) * seen
    operations = tokens * (matmul_flops_per_token(config) - head) + head + pairs * attention_flops_per_position(config)
    ends = [*range(step, tokens, step), tokens]
    states = 2 * state_bytes_per_sequence(config)
    return Cost(sum(weights + min(end, window + step) * kv + states for end in ends), operations)


@dataclass(frozen=True)
class Costs:
    """The costs of one model: `weights` and `kv` are those of `decode_cost`."""

    config: ModelConfig
    weights: float
    kv: float

    @classmethod
    def of(cls, llm: "LLM") -> "Costs":
        """Those of a model that is loaded."""
        from tinyserve.models.kv_cache import KVCache

        weights = bytes_per_step(llm.config, llm.dtype, llm.model.nbytes)
        return cls(llm.config, weights, KVCache.block_nbytes(llm.config, BLOCK, llm.kv_cache_dtype) / BLOCK)

    def decode(self, batch: int, context: float) -> Cost:
        """One step."""
        return decode_cost(self.config, self.weights, self.kv, batch, context)

    def prefill(self, tokens: int) -> Cost:
        """One prompt."""
        return prefill_cost(self.config, self.weights, self.kv, tokens)


def bytes_per_step(config: ModelConfig, dtype: str, nbytes: int) -> float:
    """Of a model's `nbytes`, those that a step reads: of a table that is no head too, only a row for each token."""
    return nbytes * weight_bytes_per_token(config, dtype) / weight_bytes(config, dtype)


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What this machine can do, measured: bytes and operations a second."""

    bandwidth: float
    operations: float


@dataclass(frozen=True)
class Measurement:
    """One work, repeated: the seconds of each counted repetition, and what one costs."""

    work: Work
    seconds: list[float]
    cost: Cost
    first_token: list[float]  # of a prefill, seconds from the request to its first token

    @property
    def rates(self) -> list[float]:
        """Tokens a second of each repetition, all sequences together."""
        return [self.work.tokens * self.work.batch / seconds for seconds in self.seconds]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.cost.bytes * self.mean / (self.work.tokens * self.work.batch)

    @property
    def operations_per_second(self) -> float:
        return self.cost.operations * self.mean / (self.work.tokens * self.work.batch)

    @property
    def time_to_first_token(self) -> float | None:
        """The median, in seconds."""
        return statistics.median(self.first_token) if self.first_token else None

    def attainable(self, limits: Limits) -> float:
        """Tokens a second where the nearer of the two limits stands: the roofline."""
        seconds = max(self.cost.bytes / limits.bandwidth, self.cost.operations / limits.operations)
        return self.work.tokens * self.work.batch / seconds

    def row(self, limits: Limits) -> dict[str, Any]:
        """All of it for scripts; lists are of the repetitions, bytes and operations those of one."""
        work = self.work
        return {
            "work": work.kind,
            "tokens": work.tokens,
            "depth": work.depth,
            "batch": work.batch,
            "mean": self.mean,
            "deviation": self.deviation,
            "median": statistics.median(self.rates),
            "mean_per_sequence": self.mean / work.batch,
            "attainable": self.attainable(limits),
            "time_to_first_token_seconds": self.time_to_first_token,
            "bytes": self.cost.bytes,
            "bytes_per_second": self.bytes_per_second,
            "share_of_bandwidth": self.bytes_per_second / limits.bandwidth,
            "operations": self.cost.operations,
            "operations_per_second": self.operations_per_second,
            "share_of_peak": self.operations_per_second / limits.operations,
            "repetitions": len(self.rates),
            "rates": self.rates,
        }


def measure_limits(llm: "LLM") -> Limits:
    """This machine's limits with the threads of `llm`: reading memory, and the operations of its dtype."""
    from tinyserve.tensor import _jit, limits

    kind = WEIGHT_DTYPES[llm.dtype]
    with _jit.one_at_a_time(llm.num_threads):
        peak = limits.integer_peak(kind.weight_bits, kind.activation_bits) if kind.is_integer else limits.float_peak()
        return Limits(limits.memory_bandwidth(), peak)


def machine(dtype: str) -> dict[str, str]:
    """The processor, and which of its instructions multiply in this dtype."""
    from tinyserve.tensor import dot_product
    from tinyserve.tensor._jit import cpu_name

    product = dot_product.PATH if WEIGHT_DTYPES[dtype].is_integer else "float32 fma"
    return {"processor": cpu_name(), "dot_product": product}


@dataclass(frozen=True)
class Probe:
    """A first look at a model's speed: seconds to read a prompt of `tokens`, and seconds of a step that decodes one."""

    tokens: int
    prefill_seconds: float
    step_seconds: float


def probe(llm: "LLM") -> Probe:
    """Read a short prompt and decode a few tokens; where that is soon done, once more with a longer one."""
    max_tokens = min(1 + PROBE_STEPS, llm.max_model_len - 1)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    for tokens in PROBES:
        length = min(tokens, llm.max_model_len - max_tokens)
        (output,) = llm.generate([_prompt(llm, length, 0)], params, progress_bar=False)
        metrics, times = output.metrics, output.metrics.token_times
        assert metrics.first_token is not None and metrics.first_scheduled is not None
        prefill = metrics.first_token - metrics.first_scheduled
        steps = [end - begin for begin, end in pairwise(times)] or [prefill]
        result = Probe(length, prefill, statistics.median(steps))
        if prefill > LONG_PROBE:
            break
    return result


def run(llm: "LLM", wanted: Sequence[Work], repetitions: int, progress: Progress = silent) -> Iterator[Measurement]:
    """Measure each work, which must fit (`plan`); yields as it goes. The first repetition of each is thrown away.

    `progress` hears (what is being done, repetitions done, repetitions in all).
    """
    for work in wanted:
        yield measure(llm, Job(work, repetitions), progress)


def measure(llm: "LLM", job: Job, progress: Progress = silent) -> Measurement:
    """Measure one work, which must fit, with no more repetitions than `plan` was told."""
    costs, work = Costs.of(llm), job.work
    if work.kind == "prefill":
        firsts, seconds = _prefill(llm, job, progress)
        return Measurement(work, seconds, costs.prefill(work.tokens), firsts)
    seconds, context = _decode(llm, job, progress)
    step = costs.decode(work.batch, context)
    return Measurement(work, seconds, Cost(work.tokens * step.bytes, work.tokens * step.operations), [])


def _prefill(llm: "LLM", job: Job, progress: Progress) -> tuple[list[float], list[float]]:
    """Of each counted repetition: seconds to the first token from the request, and from when it was scheduled."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    firsts, seconds = [], []
    for i in range(job.runs):
        progress(f"{job.work}, {_repetition(i, job)}", i, job.runs)
        (output,) = llm.generate([_prompt(llm, job.work.prompt, i)], params)
        metrics = output.metrics
        assert metrics.first_token is not None and metrics.first_scheduled is not None
        firsts.append(metrics.first_token - metrics.arrival)
        seconds.append(metrics.first_token - metrics.first_scheduled)
    return firsts[job.warm_up :], seconds[job.warm_up :]


def _decode(llm: "LLM", job: Job, progress: Progress) -> tuple[list[float], float]:
    """Seconds of each counted repetition, and how many tokens a sequence looked at in them, on average."""
    stretches = job.work.stretches(job.runs - 1)
    measured: list[tuple[float, float]] = []
    for first in range(0, job.runs, stretches):
        measured += _stretches(llm, job, stretches, progress, first)
    counted = measured[job.warm_up :]
    return [took for took, _ in counted], statistics.fmean(context for _, context in counted)


def _stretches(llm: "LLM", job: Job, count: int, progress: Progress, first: int) -> list[tuple[float, float]]:
    """Read the prompts, then time `count` stretches of `work.tokens` steps: (seconds, mean context) of each.

    In each step every sequence gains a token, so the one that comes last is the clock.
    """
    work = job.work
    most = work.most_tokens(job.runs - 1) - work.prompt
    params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
    doing = _repetition(first, job) if count == 1 else f"all {job.repetitions} repetitions"
    progress(f"{work}, {doing}", first, job.runs)
    prompts = [_prompt(llm, work.prompt, i) for i in range(work.batch)]
    tokens = [output.metrics.token_times for output in llm.generate(prompts, params, progress_bar=False)]
    times = tokens[-1][: count * work.tokens + 1 : work.tokens]
    ahead = statistics.fmean(bisect_right(times_of_one, times[0]) - 1 for times_of_one in tokens)
    start = work.prompt + ahead + (work.tokens + 1) / 2
    return [(times[i + 1] - times[i], start + i * work.tokens) for i in range(count)]


def _repetition(i: int, job: Job) -> str:
    number = i + 1 - job.warm_up
    return f"repetition {number} of {job.repetitions}" if number else "warming up"


def _prompt(llm: "LLM", length: int, seed: int) -> list[int]:
    return [(7919 * (i + 1) * (seed + 1)) % llm.config.vocab_size for i in range(length)]
