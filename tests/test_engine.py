"""The engine and its scheduler with a runner that computes nothing: who runs, in what chunks, and where blocks go."""

from typing import Any

import pytest
from fakes import FakeRunner
from refusals import refused

from tinyserve.engine import Engine
from tinyserve.errors import CacheLostError, EngineDeadError
from tinyserve.sampling_params import SamplingParams
from tinyserve.scheduling.block_manager import BlockManager
from tinyserve.scheduling.prefix_cache import BlockPrefixCache, NoPrefixCache, StatePrefixCache
from tinyserve.scheduling.scheduler import Scheduler, queue_order
from tinyserve.scheduling.sequence import Sampled, Sequence
from tinyserve.scheduling.speculative import Speculation

pytestmark = pytest.mark.fast

END = 99


def build(
    runner: FakeRunner | None = None, num_blocks: int = 64, max_model_len: int = 256, seqs: int = 4, budget: int = 32
) -> Engine:
    runner = runner or FakeRunner()
    scheduler = Scheduler(runner, BlockManager(num_blocks, 16), max_model_len, range(seqs), budget)
    return Engine(runner, scheduler, frozenset({END}))


def params(max_tokens: int = 3, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **options)


def run(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine.has_work():
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def batches(engine: Engine) -> list[list[tuple[int, int]]]:
    return engine.runner.batches


def test_one_request() -> None:
    """A prompt, then a token a step; the last token is never computed, since nothing follows it."""
    engine = build()
    sequence = engine.add([5] * 10, params(3))
    assert engine.has_work() and sequence.finish_reason is None
    assert engine.step() == [sequence]
    run(engine)
    assert batches(engine) == [[(0, 10)], [(0, 1)], [(0, 1)]]
    assert sequence.output_token_ids == [1, 1, 1] and sequence.prompt_token_ids == [5] * 10
    assert sequence.finish_reason == "length"
    assert engine.scheduler.blocks.num_free == 64 and not engine.has_work()


def test_chunked_prefill_of_a_long_prompt() -> None:
    engine = build(budget=8)
    sequence = engine.add([5] * 20, params(2))
    assert engine.step() == [] and engine.step() == [] and engine.step() == [sequence]
    run(engine)
    assert batches(engine) == [[(0, 8)], [(0, 8)], [(0, 4)], [(0, 1)]]


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    """The one that decodes comes first; the newcomer's prompt gets what is left of the budget."""
    engine = build(budget=8)
    engine.add([5] * 4, params(9))
    engine.step()
    engine.add([6] * 20, params(1))
    for _ in range(3):
        engine.step()
    assert batches(engine) == [[(0, 4)], [(0, 1), (1, 7)], [(0, 1), (1, 7)], [(0, 1), (1, 6)]]


def test_multi_step_scheduling() -> None:
    """A batch that decodes is run again until a block is full, somebody ends, or somebody waits."""
    engine = build(seqs=2)
    first = engine.add([5] * 10, params(40))
    assert engine.step(lambda: True) == [first] and first.num_output == 1  # a prompt is no decoding
    assert engine.step(lambda: True) == [first] and first.num_output == 1 + 6
    assert engine.step(lambda: True) == [first] and first.num_output == 1 + 6 + 16
    engine.add([6] * 3, params(4))
    engine.step(lambda: True)
    engine.step(lambda: True)  # the newcomer wants three more
    assert batches(engine)[-4:] == [[(0, 1), (1, 3)], *[[(0, 1), (1, 1)]] * 3]
    engine.add([7] * 3, params(9))
    engine.step(lambda: True)
    engine.add([7] * 3, params(9))  # for whom there is no place
    count = len(batches(engine))
    engine.step(lambda: True)
    assert len(batches(engine)) == count + 1 and engine.stats().num_waiting == 1
    run(engine)
    assert first.output_token_ids == [1] * 40 and engine.scheduler.blocks.num_free == 64
    assert engine.stats().steps == len(batches(engine))


def test_multi_step_scheduling_takes_no_longer_than_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr("tinyserve.engine.perf_counter", lambda: 0.003 * next(clock))
    engine, asked = build(), list[int]()
    sequence = engine.add([5], params(100))

    def may_repeat() -> bool:
        asked.append(sequence.num_output)
        return True

    engine.step()
    engine.step(may_repeat)
    assert asked == [2, 3] and sequence.num_output == 4  # three steps of 3 ms, and no fourth


def test_first_come_first_served() -> None:
    engine = build(seqs=2, budget=100)
    for length in (30, 3, 20, 1):
        engine.add([5] * length, params(2))
    run(engine)
    assert batches(engine)[0] == [(0, 30), (1, 3)]
    first_step = [next(i for i, batch in enumerate(batches(engine)) if r in dict(batch)) for r in range(4)]
    assert first_step == sorted(first_step)


def test_admission_does_not_overtake_a_large_request() -> None:
    """What waits first runs first, even if a later one would fit already: nobody starves."""
    engine = build(num_blocks=4, budget=64)
    engine.add([5] * 30, params(2))  # 2 blocks
    engine.add([5] * 50, params(2))  # 4 blocks
    engine.add([5], params(2))  # 1 block
    engine.step()
    assert batches(engine)[0] == [(0, 30)]
    run(engine)
    order = [request for batch in batches(engine) for request, _ in batch]
    assert sorted(set(order), key=order.index) == [0, 1, 2]


def test_the_token_budget_and_the_sequence_limit() -> None:
    engine = build(seqs=3, budget=10)
    for _ in range(7):
        engine.add([5] * 6, params(4))
    while engine.has_work():
        engine.step()
        assert len(engine.scheduler.running) <= 3
        assert 1 <= sum(num for _, num in batches(engine)[-1]) <= 10
        assert len({request for request, _ in batches(engine)[-1]}) == len(batches(engine)[-1])


def test_more_decoding_than_the_budget_holds() -> None:
    """With more sequences than the budget has tokens, all of them come to an end."""
    engine = build(seqs=5, budget=2)
    sequences = [engine.add([5], params(4)) for _ in range(5)]
    run(engine)
    assert [sequence.num_output for sequence in sequences] == [4] * 5
    assert all(len(batch) <= 2 for batch in batches(engine))


def test_what_ends_a_sequence() -> None:
    def answer(token: int, **options: Any) -> Sequence:
        engine = build(FakeRunner(lambda sequence: token if sequence.num_output == 1 else 1))
        sequence = engine.add([5], params(4, **options))
        run(engine)
        return sequence

    assert (answer(7).finish_reason, answer(7).num_output) == ("length", 4)
    assert (answer(END).finish_reason, answer(END).output_token_ids) == ("stop", [1, END])
    assert (answer(END, ignore_eos=True).finish_reason, answer(END, ignore_eos=True).num_output) == ("length", 4)
    assert (answer(7, stop_token_ids=[7]).finish_reason, answer(7, stop_token_ids=[7]).num_output) == ("stop", 2)


def test_the_context_ends_a_sequence() -> None:
    engine = build(max_model_len=20, num_blocks=2)
    sequence = engine.add([5] * 15, params(500))
    run(engine)
    assert len(sequence.token_ids) == 20 and sequence.finish_reason == "length"


def test_requests_that_can_never_be_served_are_refused() -> None:
    engine = build(max_model_len=100, num_blocks=4)
    with refused("prompt", "empty"):
        engine.add([], params())
    for length in (100, 101):
        with refused("prompt", f"{length} tokens and the context (max_model_len) holds 100"):
            engine.add([5] * length, params())
    with refused("max_tokens", "80 tokens and the cache holds 64"):
        engine.add([5] * 60, params(20))
    assert not engine.has_work() and engine.scheduler.blocks.num_free == 4
    engine.add([5] * 60, params(4))
    run(engine)
    assert engine.scheduler.blocks.num_free == 4


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_finishing_twice_is_harmless(steps: int) -> None:
    """While it waits, in the middle of its prompt, and while it decodes."""
    engine = build(budget=8)
    sequence = engine.add([5] * 12, params(9))
    other = engine.add([5] * 12, params(2))
    for _ in range(steps):
        engine.step()
    engine.finish(sequence, "abort")
    engine.finish(sequence, "stop")
    assert sequence.finish_reason == "abort" and sequence.cache.block_table == []
    run(engine)
    engine.finish(sequence, "abort")
    engine.finish(other, "abort")
    assert other.finish_reason == "length" and other.num_output == 2
    assert engine.scheduler.blocks.num_free == 64


def test_engine_failure_in_the_runner_loses_nothing() -> None:
    """An exception leaves every sequence where it was, and it can still be ended."""

    def fail(sequence: Sequence) -> int:
        raise RuntimeError("no")

    engine = build(FakeRunner(fail))
    sequence = engine.add([5], params())
    with pytest.raises(RuntimeError):
        engine.step()
    engine.finish(sequence, "abort")
    assert engine.scheduler.blocks.num_free == 64 and not engine.has_work()


# --- who waits, and for how long ------------------------------------------------------------------------------------


def test_decoding_gets_a_token_in_each_step_under_a_flood() -> None:
    """Newcomers with long prompts in every step; a budget that is smaller than the sequences allowed."""
    for seqs, budget in ((8, 32), (8, 5), (4, 1)):
        engine = build(seqs=seqs, budget=budget, num_blocks=400)
        sequences = []
        for i in range(120):
            sequences.append(engine.add([5] * (1 + 37 * i % 90), params(20)))
            decoding = [sequence for sequence in sequences if 0 < sequence.num_output < 20]
            before = [sequence.num_output for sequence in decoding]
            engine.step()
            assert [sequence.num_output for sequence in decoding] == [count + 1 for count in before]
        begun = [sequence.request_id for sequence in sequences if sequence.metrics.first_scheduled is not None]
        assert begun == list(range(len(begun))), "nobody is overtaken"
        assert len(begun) < 100
        run(engine)
        assert all(sequence.num_output == 20 and not sequence.metrics.preemptions for sequence in sequences)


def test_preemption_never_takes_the_first() -> None:
    """So that however short blocks are, somebody always comes nearer to the end: no two preempt each other for ever."""
    engine = build(num_blocks=7, seqs=6, budget=64)
    sequences = [engine.add([5], params(100)) for _ in range(8)]
    for _ in range(2000):
        if not engine.has_work():
            break
        first = min(engine.scheduler.running + engine.scheduler.waiting, key=queue_order)
        before = [s.num_output for s in sequences]
        engine.step()
        assert first.num_output == before[first.request_id] + 1
        assert all(sequence.num_output >= count for sequence, count in zip(sequences, before, strict=True))
    assert not engine.has_work() and [sequence.num_output for sequence in sequences] == [100] * 8
    assert sequences[0].metrics.preemptions == 0 < sum(sequence.metrics.preemptions for sequence in sequences)
    # Each time one comes back, another has ended or given up its blocks to one further ahead.
    assert all(sequence.metrics.preemptions <= sequence.request_id for sequence in sequences)


def test_a_request_that_needs_every_block_gets_them() -> None:
    """Others keep coming; it waits for those before it and for nobody else."""
    engine = build(num_blocks=8, seqs=8, budget=64)
    early = [engine.add([5] * 10, params(6)) for _ in range(6)]
    large = engine.add([5] * 110, params(18))
    steps = 0
    while large.finish_reason is None:
        engine.add([5], params(2))
        engine.step()
        steps += 1
        if large.metrics.first_scheduled is None:
            assert not any(sequence.request_id > large.request_id for sequence in engine.scheduler.running)
    assert steps <= 6 + 2 + 17 and all(sequence.finish_reason for sequence in early)
    run(engine)
    assert engine.scheduler.blocks.num_free == 8


def test_abort_of_a_sibling_before_its_prompt_is_computed() -> None:
    """Of several to one prompt: it never runs, and the others lose nothing, whichever is cancelled."""
    for cancelled in range(3):
        engine = build(budget=8)
        first = engine.add([5] * 20, params(4, n=3))
        answers = [first, *first.siblings]
        engine.step()
        engine.finish(answers[cancelled], "abort")
        run(engine)
        assert [sequence.num_output for sequence in answers] == [0 if i == cancelled else 4 for i in range(3)]
        assert [sequence.finish_reason for sequence in answers].count("length") == 2
        assert engine.scheduler.blocks.num_free == 64 and not first.siblings


def test_siblings_beyond_the_token_budget_stall_nobody() -> None:
    """Eight answers and room for four tokens a step: who decodes beside them gets one in each."""
    engine = build(seqs=16, budget=4, num_blocks=200)
    other = engine.add([6] * 3, params(50))
    engine.step()
    first = engine.add([5] * 3, params(50, n=8), priority=-1)
    answers = [first, *first.siblings]
    while other.finish_reason is None:
        before = other.num_output
        engine.step()
        assert other.num_output == before + 1
    run(engine)
    assert all(sequence.num_output == 50 for sequence in answers)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_engine_failure_in_a_copy_loses_no_sibling(fails_at: int) -> None:
    runner, copied = FakeRunner(), 0

    def copy_state(source: int, target: int) -> None:
        nonlocal copied
        copied += 1
        if copied == fails_at:
            raise RuntimeError("no")
        FakeRunner.copy_state(runner, source, target)

    runner.copy_state = copy_state  # type: ignore[method-assign]
    engine = build(runner)
    first = engine.add([5] * 10, params(4, n=3))
    answers = [first, *first.siblings]
    engine.step()
    with pytest.raises(RuntimeError):
        engine.step()
    run(engine)
    assert [sequence.num_output for sequence in answers] == [4] * 3 and engine.scheduler.blocks.num_free == 64


@pytest.mark.parametrize("kind", [BlockPrefixCache, StatePrefixCache])
def test_prefix_cache_drops_what_failed(kind: type[BlockPrefixCache]) -> None:
    """Chunks before the one that showed it may be damaged too; who shares them meanwhile goes on undisturbed."""
    runner = FakeRunner(has_states=kind is StatePrefixCache)
    execute = runner.execute
    runner.execute = lambda scheduled: [  # type: ignore[method-assign]
        tokens and ([Sampled(-1, error="no number")] if work.sequence.prompt_token_ids[-1] == 7 else tokens)
        for tokens, work in zip(execute(scheduled), scheduled, strict=True)
    ]
    engine = build(runner, budget=16, seqs=2)
    slots = [range(2, 6)] if kind is StatePrefixCache else []
    engine.scheduler.prefix_cache = prefix_cache = kind(engine.scheduler.blocks, *slots)
    good, bad = [5] * 60, [5] * 48 + [7]
    for prompt in (bad, bad):  # the second finds where it could have gone on, and keeps a state there
        sequence = engine.add(prompt, params())
        run(engine)
        assert (sequence.finish_reason, sequence.metrics.cached_tokens) == ("error", 0)
        assert prefix_cache.reusable_prefix(prompt).num_tokens == 0
    assert engine.scheduler.blocks.num_free == 64
    both = engine.add(good, params(20)), engine.add(bad, params())
    run(engine)
    assert both[0].num_output == 20 and both[1].finish_reason == "error"
    assert engine.scheduler.blocks.num_free == 64


class Eager:
    """Drafts as much as it may, whatever is accepted."""

    def __init__(self, engine: Engine):
        self.step_tokens: list[int] = []
        self.removed: list[Sequence] = []
        engine.scheduler.speculation = Speculation(self)

    def propose(self, sequences: list[Sequence], max_draft_lens: list[int]) -> list[list[int]]:
        return [[7] * length for length in max_draft_lens]

    def update_acceptance(self, sequence: Sequence, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        assert num_accepted_tokens == 0 < num_draft_tokens

    def record_step(self, num_tokens: int, seconds: float) -> None:
        assert seconds >= 0
        self.step_tokens.append(num_tokens)

    def remove(self, sequence: Sequence) -> None:
        self.removed.append(sequence)


@pytest.mark.parametrize("budget", [4, 5, 9, 64])
def test_draft_tokens_take_nobodys_token(budget: int) -> None:
    """Once all decode each gains one in every step, however much the first would like to try."""
    engine = build(FakeRunner(has_states=False), seqs=4, budget=budget)
    proposer = Eager(engine)
    sequences = [engine.add([5] * 3, params(40)) for _ in range(4)]
    for _ in range(12):
        engine.step()
    for _ in range(12):
        before = [sequence.num_output for sequence in sequences]
        engine.step()
        assert [sequence.num_output for sequence in sequences] == [count + 1 for count in before]
    run(engine)
    assert engine.stats().draft_tokens > 0
    assert max(proposer.step_tokens) == budget
    assert set(proposer.removed) == set(sequences)


def test_draft_tokens_take_nobodys_block() -> None:
    """The first may need every block some day, but the other needs one now, and is not preempted for a draft token."""
    engine = build(FakeRunner(has_states=False), seqs=2, num_blocks=4)
    Eager(engine)
    engine.add([5] * 10, params(50))
    engine.add([5] * 14, params(6))
    run(engine)
    assert engine.stats().preemptions == 0 and engine.stats().draft_tokens > 0


class Lossy(FakeRunner):
    """Loses all that it holds in some of its steps."""

    def __init__(self, lost_in: set[int], **options: Any):
        super().__init__(lambda sequence: len(sequence.token_ids) % 50, **options)
        self.lost_in, self.steps, self.recovered = lost_in, 0, 0

    def execute(self, scheduled: list[Any]) -> list[list[Sampled]]:
        self.steps += 1
        if self.steps in self.lost_in:
            super().execute(scheduled)
            raise CacheLostError("It is gone.")
        return super().execute(scheduled)

    def recover(self) -> None:
        self.recovered += 1
        self.pages.clear()
        self.states.clear()


@pytest.mark.parametrize("kind", [NoPrefixCache, BlockPrefixCache, StatePrefixCache])
def test_a_lost_cache_costs_no_token(kind: type[NoPrefixCache]) -> None:
    """The runner's memory is of numbers that stand for texts: whoever relied on what is gone would be caught."""

    def answers(lost_in: set[int]) -> tuple[list[list[int]], int]:
        runner = Lossy(lost_in, has_states=kind is StatePrefixCache)
        blocks = BlockManager(40, 16)
        cache = kind(blocks, range(4, 8)) if kind is StatePrefixCache else kind(blocks)
        engine = Engine(runner, Scheduler(runner, blocks, 200, range(4), 24, cache), frozenset({END}))
        done = []
        for _ in range(2):
            sequences = [engine.add([5] * (7 + 13 * i), params(12, n=2 if i == 2 else 1)) for i in range(6)]
            done += [one for sequence in sequences for one in (sequence, *sequence.siblings)]
            run(engine)
        assert blocks.num_free == 40 and len(engine.scheduler._free_slots) >= 4
        assert runner.recovered == len(lost_in)
        return [one.output_token_ids for one in done], engine.stats().preemptions

    expected, _ = answers(set())
    for lost_in in ({1}, {2, 3, 4}, {1, 5, 9, 30, 31, 45}):
        found, preemptions = answers(lost_in)
        assert found == expected and preemptions >= len(lost_in)


def test_a_cache_that_is_lost_again_and_again_ends_the_engine() -> None:
    engine = build(Lossy({2, 3, 4, 5}))
    engine.add([5] * 4, params())
    assert len(engine.step()) == 1
    with pytest.raises(EngineDeadError, match=r"It is gone\. That was 4 times in a row\."):
        engine.step()
