"""`bench_budget`: what is planned for machines of known speed and pretended clocks. Nothing is timed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import checkpoints
import pytest

from tinyserve.evaluation import bench
from tinyserve.evaluation.bench import Cost, Costs, Job, Measurement, Probe, Work
from tinyserve.evaluation.bench_budget import BUDGET, QUICK_BUDGET, Planner, Speeds, Wish
from tinyserve.models.config import parse_config, preset_config
from tinyserve.models.config.costs import weight_bytes

pytestmark = pytest.mark.fast

LLAMA = parse_config(checkpoints.CONFIGS["llama"])
FALCON, HYBRID, MIXTURE = map(preset_config, ("falcon-7b", "granite-350m", "granite-3.0-1b-a400m"))
ALL = bench.works(bench.PREFILL, bench.DEPTHS, bench.BATCHES, bench.DECODE)


def _costs(config: Any) -> Costs:
    return Costs(config, bench.bytes_per_step(config, "w8a16", weight_bytes(config, "w8a16")), 7)


@dataclass
class Machine:
    """One that reads prompts and decodes at these speeds, and has a clock of its own."""

    costs: Costs
    prefill: float  # tokens a second
    decode: float  # steps a second, of one sequence
    batched: float = 1.0  # how much cheaper a further sequence is than a token of a prompt
    clock: float = 0.0

    def truth(self) -> Speeds:
        speeds = Speeds.of(self.costs, Probe(64, 64 / self.prefill, 1 / self.decode))
        return replace(speeds, batched=self.batched * speeds.prefill)

    def probe(self) -> Speeds:
        self.clock += 64 / self.prefill + 4 / self.decode
        return replace(self.truth(), batched=None)

    def run(self, wish: Wish, seconds: float) -> tuple[Planner, list[Job]]:
        """Plan and pretend to measure, as bench_budget.run does."""
        planner, jobs, truth = Planner(self.probe(), wish), [], self.truth()
        while job := planner.next(seconds - self.clock):
            self.clock += truth.seconds(job)
            planner.learn(self.measured(job))
            jobs.append(job)
        return planner, jobs

    def measured(self, job: Job) -> Measurement:
        work = job.work
        if work.kind == "prefill":
            cost = self.costs.prefill(work.tokens)
        else:
            step = self.costs.decode(work.batch, work.prompt + work.tokens / 2)
            cost = Cost(work.tokens * step.bytes, work.tokens * step.operations)
        return Measurement(work, [self.truth().repetition(work)] * job.repetitions, cost, [])


def _left_out(wish: Wish, jobs: Sequence[Job]) -> list[Work]:
    return bench.left_out(wish.works, [job.work for job in jobs])


def test_what_is_predicted_is_what_was_seen() -> None:
    speeds = Speeds.of(_costs(LLAMA), Probe(64, 2.0, 0.5))
    assert speeds.prompt(64) == pytest.approx(2.0)
    # A step's own products are in what it was seen to take; what looks further back than nothing is beyond them.
    attention = 1440 * 64 / speeds.prefill
    assert speeds.step(1, 64) == pytest.approx(0.5 + attention)
    one, two = (speeds.step(batch, 10) for batch in (1, 2))
    assert two > one
    assert speeds.seconds(Job(Work("prefill", 64), 3)) == pytest.approx(4 * 2.0)
    assert speeds.seconds(Job(Work("prefill", 64), 3, warm_up=False)) == pytest.approx(3 * 2.0)
    # One reading of eight prompts goes before all repetitions at a depth.
    deep = Work("decode", 4, 64, 8)
    assert speeds.seconds(Job(deep, 2)) == pytest.approx(8 * 2.0 + 3 * 4 * speeds.step(8, 66))


def test_each_measurement_corrects_the_speed_that_it_shows() -> None:
    machine = Machine(_costs(FALCON), prefill=20, decode=2, batched=3)
    wrong = Speeds.of(machine.costs, Probe(64, 64 / 10, 1 / 4))
    truth = machine.truth()
    for work in (Work("prefill", 512), Work("decode", 8, 0, 1), Work("decode", 8, 0, 8), Work("decode", 8, 0, 1)):
        wrong = wrong.corrected(machine.measured(Job(work, 3)))
    assert wrong.prompt(512) == pytest.approx(truth.prompt(512))
    for batch in (1, 8, 32):
        assert wrong.step(batch, 5) == pytest.approx(truth.step(batch, 5), rel=0.05)
    # A step that was faster than its bytes alone were thought to be: still a speed.
    hurried = wrong.corrected(Measurement(Work("decode", 8, 0, 8), [1e-9], Cost(8.0, 1e9), []))
    assert 0 < hurried.step(8, 5) < math.inf


@pytest.mark.parametrize("config", [FALCON, HYBRID, MIXTURE], ids=["falcon", "hybrid", "mixture"])
@pytest.mark.parametrize("batched", [0.5, 1, 4])
@pytest.mark.parametrize("speed", [0.7, 2, 7, 20, 100, 400, 3000])
def test_any_machine_is_done_in_about_the_time(config: Any, batched: float, speed: float) -> None:
    machine = Machine(_costs(config), prefill=speed, decode=max(0.3, speed / 10), batched=batched)
    wish = Wish(ALL, bench.REPETITIONS)
    begun = machine.clock
    planner, jobs = machine.run(wish, BUDGET)
    # Of what is left only a first batch can be dearer than was thought; a machine too slow for a probe still ends.
    assert machine.clock - begun < BUDGET * (1.3 if speed > 1 else 2.5)
    kinds = [job.work.kind for job in jobs]
    assert kinds[:2] == ["prefill", "decode"]
    assert jobs[1].work.place == Work("decode", 1, 0, 1).place
    done, left_out = {job.work.place for job in jobs}, _left_out(wish, jobs)
    assert len(done) == len(jobs)
    assert all(work.place not in done for work in left_out)
    assert all(1 <= job.repetitions <= bench.REPETITIONS for job in jobs)
    assert all(job.work.tokens >= 16 for job in jobs if job.work.kind == "prefill")
    if left_out:
        assert planner.full_seconds() > BUDGET / 2


def test_a_fast_machine_measures_all_and_a_slow_one_shorter_prompts() -> None:
    wish = Wish(ALL, 5)
    _, jobs = Machine(_costs(FALCON), 50_000, 5_000).run(wish, BUDGET)
    assert _left_out(wish, jobs) == []
    assert {(job.repetitions, job.warm_up) for job in jobs} == {(5, True)}
    assert [job.work for job in jobs][:2] == [Work("prefill", 512), Work("decode", 32, 0, 1)]

    _, jobs = Machine(_costs(FALCON), 20, 2).run(wish, BUDGET)  # a prompt of 512 takes 26 s, and 32 tokens 16 s
    assert jobs[0] == Job(Work("prefill", 512), 1, warm_up=False)
    assert jobs[1] == Job(Work("decode", 8, 0, 1), 3, warm_up=False)

    _, jobs = Machine(_costs(FALCON), 8, 2).run(wish, BUDGET)
    assert (jobs[0].work, jobs[0].warm_up) == (Work("prefill", 128), False)
    assert Work("prefill", 512) in _left_out(wish, jobs)

    _, jobs = Machine(_costs(FALCON), 2, 0.5).run(wish, BUDGET)
    assert jobs[0].work == Work("prefill", 32)
    assert {Work("prefill", length) for length in bench.PREFILL} <= set(_left_out(wish, jobs))

    _, jobs = Machine(_costs(FALCON), 0.3, 0.05).run(wish, BUDGET)
    assert jobs == [Job(Work("prefill", 16), 1, warm_up=False), Job(Work("decode", 2, 0, 1), 1, warm_up=False)]


def test_the_quick_version_has_all_of_its_time_for_two_works() -> None:
    wish = Wish(bench.works(bench.QUICK_PREFILL, bench.QUICK_DEPTHS, bench.QUICK_BATCHES, 32), 3)
    _, jobs = Machine(_costs(FALCON), 20, 2).run(wish, QUICK_BUDGET)
    assert [job.work.kind for job in jobs] == ["prefill", "decode"]
    assert jobs[0].work.tokens in (128, 256) and jobs[1].work.tokens == 8


def test_what_comes_last_has_all_the_time_that_is_left() -> None:
    speeds = Speeds.of(_costs(LLAMA), Probe(64, 64 / 20, 0.5))
    planner = Planner(speeds, Wish([Work("prefill", 128), Work("prefill", 2048)], 3))
    planner._first.clear()
    assert planner.next(30) == Job(Work("prefill", 128), 3, warm_up=False)  # a third of it has room for one
    assert planner.next(11) is None


def test_what_was_named_is_measured_whatever_it_takes() -> None:
    named = [Work("prefill", 2048), Work("decode", 32, 512, 8)]
    machine = Machine(_costs(FALCON), 8, 2)
    planner, jobs = machine.run(Wish(ALL, 5, named), BUDGET)
    assert [job.work.place for job in jobs] == [work.place for work in named]
    assert jobs[0] == Job(Work("prefill", 2048), 1, warm_up=False)
    assert planner.next(-1) is None

    _, jobs = Machine(_costs(FALCON), 8, 2).run(Wish(named, 4, named, True, True), BUDGET)
    assert [(job.work, job.repetitions) for job in jobs] == [(work, 4) for work in named]


def test_numbers_that_were_given_are_kept() -> None:
    _, jobs = Machine(_costs(FALCON), 20, 2).run(Wish(ALL, 2, fixed_repetitions=True), BUDGET)
    assert {job.repetitions for job in jobs} == {2}
    _, jobs = Machine(_costs(FALCON), 20, 2).run(Wish(ALL, 5, fixed_decode=True), BUDGET)
    assert {job.work.tokens for job in jobs if job.work.kind == "decode"} == {32}


def test_nothing_wanted_is_nothing_planned() -> None:
    speeds = Speeds.of(_costs(LLAMA), Probe(64, 1.0, 0.1))
    assert Planner(speeds, Wish([], 5)).next(90) is None
    only_prompts = Planner(speeds, Wish([Work("prefill", 8)], 5))
    assert only_prompts.next(-5) == Job(Work("prefill", 8), 1)
    assert only_prompts.next(90) is None
