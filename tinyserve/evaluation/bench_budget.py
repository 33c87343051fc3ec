"""What of a benchmark fits into some seconds: works in the order of their worth, as often as there is time for.

Knows how long a work will take from what it costs and from the speeds measured so far; the measuring is in bench.py.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

from tinyserve.evaluation.bench import Costs, Job, Measurement, Probe, Work, measure, probe
from tinyserve.progress import Progress, silent

if TYPE_CHECKING:
    from tinyserve.llm import LLM

BUDGET, QUICK_BUDGET = 90, 20  # seconds
PREFILL = 512  # tokens of the prompt that says most
LEAST_PREFILL, LEAST_DECODE, SHORT_DECODE = 16, 2, 8  # tokens: where nothing longer fits, and rather than one run only
SLOW = 1.0  # seconds of a repetition in which what a first one takes longer does not show
ENOUGH = 3  # repetitions of what is slow: the least that have a median
SHARES = 3  # a work has at least a third of the time that is left


@dataclass(frozen=True)
class Speeds:
    """What predicts seconds: operations a second of prefill, and the bytes a second of a step for one sequence.

    `batched` is the operations a second of what a step does beyond one sequence's matrix products; until that is
    measured, prefill's.
    """

    costs: Costs
    prefill: float
    decode: float
    batched: float | None = None

    @classmethod
    def of(cls, costs: Costs, seen: Probe) -> "Speeds":
        """From a first look."""
        prefill = costs.prefill(seen.tokens).operations / seen.prefill_seconds
        return cls(costs, prefill, costs.decode(1, seen.tokens).bytes / seen.step_seconds)

    def prompt(self, tokens: int) -> float:
        """Seconds to read a prompt."""
        return self.costs.prefill(tokens).operations / self.prefill

    def step(self, batch: int, context: float) -> float:
        """Seconds of one decode step."""
        return self.costs.decode(batch, context).bytes / self.decode + self._beyond(batch, context)

    def repetition(self, work: Work) -> float:
        """Seconds that one repetition counts."""
        if work.kind == "prefill":
            return self.prompt(work.tokens)
        return work.tokens * self.step(work.batch, work.prompt + work.tokens / 2)

    def seconds(self, job: Job) -> float:
        """Seconds of all that a job does, prompts that come before what is counted included."""
        work = job.work
        if work.kind == "prefill":
            return job.runs * self.prompt(work.tokens)
        if work.depth == 0:
            return job.runs * (self.step(work.batch, 1) + self.repetition(work))
        return work.batch * self.prompt(work.depth) + job.runs * self.repetition(work)

    def corrected(self, measured: Measurement) -> "Speeds":
        """The speed that a work depends on most, as it was measured."""
        work, seconds = measured.work, statistics.median(measured.seconds)
        if work.kind == "prefill":
            return replace(self, prefill=measured.cost.operations / seconds)
        step, nbytes = seconds / work.tokens, measured.cost.bytes / work.tokens
        if work.batch == 1:
            context = work.prompt + work.tokens / 2
            return replace(self, decode=nbytes / max(step - self._beyond(1, context), step / 2))
        beyond = measured.cost.operations / work.tokens - self.costs.decode(1, 0).operations
        return replace(self, batched=beyond / max(step - nbytes / self.decode, step / 10))

    def _beyond(self, batch: int, context: float) -> float:
        operations = self.costs.decode(batch, context).operations - self.costs.decode(1, 0).operations
        return operations / (self.batched or self.prefill)


@dataclass(frozen=True)
class Wish:
    """Works to measure if there is time, each `repetitions` times; `named` ones are measured in any case.

    Numbers that are `fixed` are kept: none of fewer repetitions, or of fewer tokens decoded in one.
    """

    works: Sequence[Work]
    repetitions: int
    named: Sequence[Work] = ()
    fixed_repetitions: bool = False
    fixed_decode: bool = False


class Planner:
    """Says what to measure next in the seconds that are left, and learns from what was measured.

    First come a prefill and a decode, or all that was named; then the cheapest of what remains, while one fits.
    """

    def __init__(self, speeds: Speeds, wish: Wish):
        self.speeds, self.wish = speeds, wish
        self._waiting = list(wish.works)
        self._first = self._of_each_kind()

    def next(self, left: float) -> Job | None:
        """The job that comes now, with `left` seconds to go; None where nothing more fits."""
        if not self._waiting:
            return None
        if self._first:  # they are measured in any case
            work = self._first.pop(0)
            share = self._share(work, left)
            job = self._fitting(work, share) or (
                self._least(work) if work in self.wish.named else self._shorter(work, share)
            )
        else:
            work = min(self._waiting, key=self._least_seconds)
            if self._least_seconds(work) > left:
                return None
            job = self._fitting(work, self._share(work, left)) or self._least(work)
        # A decode of fewer tokens stands for the one that was wished for; a shorter prompt is another work.
        self._waiting = [other for other in self._waiting if other != (work if work.kind == "decode" else job.work)]
        return job

    def learn(self, measured: Measurement) -> None:
        """Predict from now on by what was measured."""
        self.speeds = self.speeds.corrected(measured)

    def full_seconds(self) -> float:
        """What all works would take, with all their repetitions."""
        return sum(self.speeds.seconds(Job(work, self.wish.repetitions)) for work in self.wish.works)

    def _of_each_kind(self) -> list[Work]:
        """What was named; where nothing of a kind was, the work that says most."""
        first = []
        for kind in ("prefill", "decode"):
            works = [work for work in self.wish.works if work.kind == kind]
            first += [work for work in works if work in self.wish.named] or sorted(works, key=_worth)[:1]
        return first

    def _share(self, work: Work, left: float) -> float:
        """The seconds of a work that comes now, so that there are some for those that can come after it."""
        then = left - self._least_seconds(work)
        others = [
            other
            for other in self._waiting
            if other != work and (other in self._first or self._least_seconds(other) <= then)
        ]
        return left / min(SHARES, 1 + len(others))

    def _fitting(self, work: Work, seconds: float, decode: int = SHORT_DECODE) -> Job | None:
        """As many repetitions as fit into these seconds: rather shorter ones than fewer than enough."""
        enough = min(ENOUGH, self.wish.repetitions)
        jobs = [job for length in self._lengths(work, decode) if (job := self._most(length, seconds))]
        return next((job for job in jobs if job.repetitions >= enough), jobs[-1] if jobs else None)

    def _most(self, work: Work, seconds: float) -> Job | None:
        """The most repetitions that fit."""
        jobs = [self._repeated(work, count) for count in range(self.wish.repetitions, self._fewest - 1, -1)]
        return next((job for job in jobs if self.speeds.seconds(job) <= seconds), None)

    def _least(self, work: Work, decode: int = SHORT_DECODE) -> Job:
        """The cheapest job that measures a work at all, with no fewer than `decode` tokens decoded."""
        return self._repeated(self._lengths(work, decode)[-1], self._fewest)

    def _least_seconds(self, work: Work) -> float:
        return self.speeds.seconds(self._least(work))

    def _shorter(self, work: Work, seconds: float) -> Job:
        """A job in the place of one that does not fit: a shorter prompt, or even fewer tokens decoded."""
        if work.kind == "decode":
            return self._fitting(work, seconds, LEAST_DECODE) or self._least(work, LEAST_DECODE)
        lengths = sorted((other.tokens for other in self.wish.works if other.kind == "prefill"), reverse=True)
        while (half := lengths[-1] // 2) >= LEAST_PREFILL:
            lengths.append(half)
        prompts = [replace(work, tokens=length) for length in lengths if length <= work.tokens]
        jobs = (self._fitting(prompt, seconds) for prompt in prompts)
        return next((job for job in jobs if job), self._least(prompts[-1]))

    def _lengths(self, work: Work, decode: int) -> list[Work]:
        """A work, and the same with half the tokens decoded again and again; a prompt keeps its own."""
        works = [work]
        while work.kind == "decode" and not self.wish.fixed_decode and works[-1].tokens // 2 >= decode:
            works.append(replace(work, tokens=works[-1].tokens // 2))
        return works

    @property
    def _fewest(self) -> int:
        return self.wish.repetitions if self.wish.fixed_repetitions else 1

    def _repeated(self, work: Work, repetitions: int) -> Job:
        """Slow works do without the repetition that is not counted, and without more than enough of the others."""
        if self.speeds.repetition(work) <= SLOW:
            return Job(work, repetitions)
        return Job(work, max(self._fewest, min(ENOUGH, repetitions)), warm_up=False)


def _worth(work: Work) -> tuple[int, int]:
    """Sorts works of a kind, what says most first: the prompt nearest to 512 tokens, the decode of least context."""
    return (abs(work.tokens - PREFILL), work.tokens) if work.kind == "prefill" else (work.depth, work.batch)


def first_look(llm: "LLM", wish: Wish) -> Planner:
    """A planner that knows how fast this model is here, from a short prompt and a few tokens."""
    return Planner(Speeds.of(Costs.of(llm), probe(llm)), wish)


def run(llm: "LLM", planner: Planner, end: float, progress: Progress = silent) -> Iterator[Measurement]:
    """Measure what a planner says, until about `end` by time.perf_counter; yields as it goes.

    `progress` hears what bench.run tells.
    """
    while job := planner.next(end - perf_counter()):
        measured = measure(llm, job, progress)
        planner.learn(measured)
        yield measured
