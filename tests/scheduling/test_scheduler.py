"""Any mix of requests, steps, failures and cancellations: no block is lost or owned twice, and each reads its own text.

The fake runner's memory stands for keys, values and states; what a wrongly shared or copied one would give is caught
in the step that reads it.
"""

import random
from collections import Counter
from typing import Any

import pytest
from fakes import FakeRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tinyserve.engine import Engine
from tinyserve.errors import RequestError
from tinyserve.sampling_params import SamplingParams
from tinyserve.scheduling.block_manager import BlockManager
from tinyserve.scheduling.draft_model import DraftModel
from tinyserve.scheduling.prefix_cache import BlockPrefixCache, NoPrefixCache, StatePrefixCache
from tinyserve.scheduling.scheduler import Scheduler, queue_order
from tinyserve.scheduling.sequence import CacheState, PrefillOnlySequence, Sampled, Sequence
from tinyserve.scheduling.speculative import Speculation

pytestmark = pytest.mark.fast

END, MAX_MODEL_LEN, BLOCK = 99, 80, 4
KINDS = ("none", "blocks", "states")
DRAFTS = ("none", "wrong at some place", "of a model with blocks", "of a model with states")


def next_token(sequence: Sequence) -> int:
    """A function of the text and of the answer's own seed, so that answers differ and can be told without an engine."""
    return _after(sequence.token_ids, sequence.params.seed or 0)


def _after(token_ids: list[int], seed: int) -> int:
    chosen = (sum(token_ids[-5:]) * 31 + len(token_ids) * 7 + seed) % 23
    return END if chosen == 11 else chosen % 3


def draft_token(sequence: Sequence) -> int:
    """What a draft model makes of a text: often the same."""
    token = next_token(sequence)
    return token if sum(sequence.token_ids[-3:]) % 4 else (token + 1) % 3


class SometimesWrong:
    """Drafts what comes, all of it or up to some place."""

    def propose(self, sequences: list[Sequence], max_draft_lens: list[int]) -> list[list[int]]:
        return [self._draft(*one) for one in zip(sequences, max_draft_lens, strict=True)]

    def _draft(self, sequence: Sequence, max_draft_len: int) -> list[int]:
        text = list(sequence.token_ids)
        for _ in range(min(max_draft_len, 6)):
            text.append(_after(text, sequence.params.seed or 0))
        draft, wrong = text[len(sequence.token_ids) :], len(sequence.token_ids) % 8
        if wrong < len(draft):
            draft[wrong] = (draft[wrong] + 1) % 3
        return draft

    def update_acceptance(self, sequence: Sequence, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        assert num_accepted_tokens <= num_draft_tokens

    def record_step(self, num_tokens: int, seconds: float) -> None: ...

    def remove(self, sequence: Sequence) -> None: ...


class Tireless(DraftModel):
    """Drafts whether it pays or not."""

    def _draft_length(self, sequence: Sequence, most: int, num_sequences: int) -> int:
        return most


class Setting:
    """An engine over a small cache, and everything it was ever given."""

    def __init__(
        self, kind: str, num_blocks: int, seqs: int, budget: int, snapshots: int, stride: int, drafts: str = "none"
    ):
        self.blocks = BlockManager(num_blocks, BLOCK)
        self.seqs, self.snapshots, self.num_slots = seqs, snapshots, seqs + snapshots
        self.prefix_cache: NoPrefixCache = {
            "none": lambda: NoPrefixCache(self.blocks),
            "blocks": lambda: BlockPrefixCache(self.blocks),
            "states": lambda: StatePrefixCache(self.blocks, range(seqs, self.num_slots), stride),
        }[kind]()
        self.runner = FakeRunner(next_token, BLOCK, has_states=kind != "blocks")
        self.fails_at: str | None = None
        self.execute, self.runner.execute = self.runner.execute, self._execute  # type: ignore[method-assign]
        self.draft = self._draft(num_blocks, seqs, budget, drafts.endswith("states")) if "model" in drafts else None
        speculation = None
        if drafts != "none":
            rollback_slots = range(self.num_slots, self.num_slots + 2) if self.runner.has_states else None
            proposer = Tireless(self.draft, 5) if self.draft else SometimesWrong()
            speculation = Speculation(proposer, rollback_slots)
        max_model_len = min(MAX_MODEL_LEN, num_blocks * BLOCK)
        self.scheduler = Scheduler(
            self.runner, self.blocks, max_model_len, range(seqs), budget, self.prefix_cache, speculation
        )  # fmt: skip
        self.engine = Engine(self.runner, self.scheduler, frozenset({END}))
        self.sequences: list[Sequence] = []
        self.text: PrefillOnlySequence | None = None  # one that is only read

    def _draft(self, num_blocks: int, seqs: int, budget: int, has_states: bool) -> Engine:
        """An engine for drafts, whose cache may be too small for what the other holds."""
        blocks, runner = BlockManager(num_blocks, BLOCK), FakeRunner(draft_token, BLOCK, has_states)
        prefix_cache = StatePrefixCache(blocks, range(seqs, 4 * seqs)) if has_states else BlockPrefixCache(blocks)
        execute = runner.execute

        def sometimes_fails(scheduled: list[Any]) -> list[Any]:
            if self.fails_at == "draft":
                self.fails_at = None
                raise RuntimeError("the draft model fails")
            return execute(scheduled)

        runner.execute = sometimes_fails  # type: ignore[method-assign]
        return Engine(
            runner, Scheduler(runner, blocks, num_blocks * BLOCK, range(seqs), budget, prefix_cache), frozenset({END})
        )  # fmt: skip

    def _execute(self, scheduled: list[Any]) -> list[Any]:
        fails_at, self.fails_at = self.fails_at, None
        if fails_at == "before":
            raise RuntimeError("before anything was computed")
        results = self.execute(scheduled)
        if fails_at == "after":
            raise RuntimeError("when all was computed")
        if fails_at == "nan":
            return [tokens and [Sampled(-1, error="not a number")] for tokens in results]
        return results

    def add(self, prompt: list[int], max_tokens: int, n: int = 1, priority: int = 0) -> None:
        prompt = prompt[: self.scheduler.max_model_len - 1]
        params = SamplingParams(max_tokens=max_tokens, n=n, seed=5)
        first = self.engine.add(prompt, params, priority)
        self.sequences += [first, *first.siblings]

    def step(self, fails_at: str | None = None, repeats: int = 0) -> None:
        if not self.engine.has_work():
            return
        self.fails_at, has_failed, left = fails_at, False, iter(range(repeats))
        try:
            self.engine.step(may_repeat=lambda: next(left, None) is not None)
        except RuntimeError:
            has_failed = True
        if fails_at != "draft":  # which may have nobody to draft for
            assert has_failed == (fails_at in ("before", "after") and bool(self.scheduler.scheduled))
        assert self.scheduler.scheduled or self.text, "a step does nothing, and never will"
        self.fails_at = None

    def read(self, num_tokens: int) -> None:
        """Begin a text, in blocks that those who came last give up; or end the one that was begun."""
        if self.text:
            self.scheduler.finish_prefill_only(self.text)
            self.text = None
            return
        num_tokens = min(num_tokens, self.blocks.num_blocks * BLOCK)
        self.text = self.scheduler.start_prefill_only([1] * num_tokens, self.num_slots + 2)
        for block in self.text.cache.block_table:
            self.runner.pages[block] = [-1] * BLOCK

    def check(self) -> None:
        """Who holds what adds up, and nobody writes where another reads."""
        scheduler = self.scheduler
        caches = [sequence.cache for sequence in [*scheduler.running, *([self.text] if self.text else [])]]
        held = Counter(block for cache in caches for block in cache.block_table)
        for block in range(self.blocks.num_blocks):
            assert self.blocks.ref_count(block) == held[block]
        assert self.blocks.num_free == self.blocks.num_blocks - len(held)
        for sequence in scheduler.running:
            own = sequence.cache.block_table[sequence.cache.num_computed // BLOCK :]
            assert all(held[block] == 1 for block in own), "a block that is still written is shared"
        slots = [sequence.cache.state_slot for sequence in scheduler.running] + list(scheduler._free_slots)
        if isinstance(self.prefix_cache, StatePrefixCache):
            kept = [snapshot.state_slot for snapshot in self.prefix_cache._snapshots.values()]
            slots += kept + self.prefix_cache._free_slots
            assert len(kept) <= self.snapshots
        else:
            slots += range(self.seqs, self.num_slots)
        assert sorted(slots) == list(range(self.num_slots)), "a slot is lost, or owned twice"
        assert len(scheduler.running) <= self.seqs
        for queue in (scheduler.waiting, scheduler.running):
            assert queue == sorted(queue, key=queue_order)
        if self.draft is not None:
            self._check_draft(self.draft)

    def _check_draft(self, draft: Engine) -> None:
        """Between two steps a draft model works for nobody, and all its memory is free."""
        blocks, prefix_cache = draft.scheduler.blocks, draft.scheduler.prefix_cache
        assert not draft.has_work() and blocks.num_free == blocks.num_blocks
        slots = list(draft.scheduler._free_slots)
        if isinstance(prefix_cache, StatePrefixCache):
            slots += [snapshot.state_slot for snapshot in prefix_cache._snapshots.values()] + prefix_cache._free_slots
        num_slots = self.seqs * (4 if isinstance(prefix_cache, StatePrefixCache) else 1)
        assert sorted(slots) == list(range(num_slots)), "a slot is lost, or owned twice"

    def finish(self) -> None:
        """All that is left comes to its end, with the answers it gives alone."""
        if self.text:
            self.read(0)
        for _ in range(100_000):
            if not self.engine.has_work():
                break
            self.engine.step()
        assert not self.engine.has_work(), "the engine does not come to an end"
        self.check()
        assert self.blocks.num_free == self.blocks.num_blocks
        for sequence in self.sequences:
            assert sequence.cache.block_table == [] and not sequence.is_running and not sequence.siblings
            assert sequence.finish_reason is not None
            expected = self.alone(sequence)
            if sequence.finish_reason in ("abort", "error"):
                expected = expected[: sequence.num_output]
            assert sequence.output_token_ids == expected

    def alone(self, sequence: Sequence) -> list[int]:
        text, most = list(sequence.prompt_token_ids), sequence.params.max_tokens
        while len(text) < min(len(sequence.prompt_token_ids) + most, self.scheduler.max_model_len):
            text.append(_after(text, sequence.params.seed or 0))
            if text[-1] == END:
                break
        return text[len(sequence.prompt_token_ids) :]


# Few tokens and common beginnings: texts meet and part at every place of a block.
prompts = st.tuples(st.integers(0, 2), st.integers(0, 40), st.lists(st.integers(0, 1), max_size=9)).map(
    lambda parts: [parts[0], *(i % 2 for i in range(parts[1])), *parts[2]]
)


class Machine(RuleBasedStateMachine):
    @initialize(
        kind=st.sampled_from(KINDS), num_blocks=st.integers(3, 30), seqs=st.integers(1, 5), budget=st.integers(1, 40),
        snapshots=st.integers(0, 4), stride=st.integers(1, 30), drafts=st.sampled_from(DRAFTS),
    )  # fmt: skip
    def build(self, **options: Any) -> None:
        self.setting = Setting(**options)

    @rule(prompt=prompts, max_tokens=st.integers(1, 30), n=st.integers(1, 3), priority=st.integers(0, 1))
    def add(self, prompt: list[int], max_tokens: int, n: int, priority: int) -> None:
        self.setting.add(prompt, max_tokens, n, priority)

    @rule(which=st.integers(0, 40))
    def add_what_goes_on_from_an_answer(self, which: int) -> None:
        if which < len(self.setting.sequences):
            self.setting.add([*self.setting.sequences[which].token_ids, 1], 5)

    @rule(count=st.integers(1, 8), repeats=st.integers(0, 20))
    def steps(self, count: int, repeats: int) -> None:
        for _ in range(count):
            self.setting.step(repeats=repeats)

    @rule(how=st.sampled_from(["before", "after", "nan", "draft"]))
    def a_step_fails(self, how: str) -> None:
        self.setting.step(how)

    @rule(which=st.integers(0, 40))
    def abort(self, which: int) -> None:
        if which < len(self.setting.sequences):
            self.setting.engine.finish(self.setting.sequences[which], "abort")

    @rule(which=st.integers(0, 4))
    def preempt(self, which: int) -> None:
        if which < len(self.setting.scheduler.running):
            self.setting.scheduler.preempt(self.setting.scheduler.running[which])

    @rule(num_tokens=st.integers(1, 120))
    def read(self, num_tokens: int) -> None:
        self.setting.read(num_tokens)

    @invariant()
    def it_adds_up(self) -> None:
        if hasattr(self, "setting"):
            self.setting.check()

    def teardown(self) -> None:
        if hasattr(self, "setting"):
            self.setting.finish()


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyMix = Machine.TestCase


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_thousand_operations(kind: str) -> None:
    """A third each: nothing is cached, blocks are, states are."""
    chance = random.Random(KINDS.index(kind))
    done, preemptions, reused, draft_tokens, accepted_tokens = 0, 0, 0, 0, 0
    while done < 34_000:
        setting = Setting(
            kind, chance.randint(6, 40), chance.randint(1, 8), chance.randint(1, 60), chance.randint(1, 6),
            chance.randint(1, 40), chance.choice(DRAFTS),
        )  # fmt: skip
        texts = [[chance.randint(0, 2) for _ in range(chance.randint(1, 60))] for _ in range(4)]
        for operation in range(1000):
            match chance.random():
                case x if x < 0.12 and len(setting.scheduler.waiting) < 12:
                    text = chance.choice([*texts, *(s.token_ids for s in setting.sequences[-4:])])
                    prompt = text[: chance.randint(1, len(text))] + [1] * chance.randint(0, 3)
                    setting.add(prompt, chance.randint(1, 40), chance.choice([1, 1, 1, 1, 3]), chance.randint(0, 1))
                case x if x < 0.15 and setting.sequences:
                    setting.engine.finish(chance.choice(setting.sequences[-20:]), "abort")
                case x if x < 0.16 and setting.scheduler.running:
                    setting.scheduler.preempt(chance.choice(setting.scheduler.running))
                case x if x < 0.18:
                    setting.read(chance.randint(1, 80))
                case x if x < 0.19:
                    setting.step(chance.choice(["before", "after", "nan", "draft"]))
                case _:
                    setting.step(repeats=chance.choice([0, 0, 0, 20]))
            if operation % 5 == 0:
                setting.check()
        setting.finish()
        done += 1000
        preemptions += sum(sequence.metrics.preemptions for sequence in setting.sequences)
        stats = setting.engine.stats()
        draft_tokens, accepted_tokens = draft_tokens + stats.draft_tokens, accepted_tokens + stats.accepted_tokens
        reused += sum(one.metrics.cached_tokens for one in setting.sequences if one.params.n == 1)
    assert preemptions > 500
    assert 5_000 < accepted_tokens < draft_tokens
    assert (reused > 1_000) == (kind != "none")


@given(kind=st.sampled_from(KINDS), text=prompts, budget=st.integers(1, 40), seqs=st.integers(1, 4))
def test_prefix_cache_of_an_answer_leaves_its_new_tokens_to_compute(
    kind: str, text: list[int], budget: int, seqs: int
) -> None:
    setting = Setting(kind, 400, seqs, budget, snapshots=4, stride=1000)
    setting.add(text, 6)
    setting.finish()
    answer, before = setting.sequences[0], len(setting.runner.batches)
    setting.add([*answer.token_ids, 1, 2, 0], 1)
    setting.finish()
    prompt = len(answer.token_ids) + 3
    computed_before = len(answer.token_ids) - 1  # the last token of an answer is not computed
    reused = 0 if kind == "none" else computed_before
    assert sum(num for batch in setting.runner.batches[before:] for _, num in batch) == prompt - reused
    assert setting.sequences[1].metrics.cached_tokens == reused


@pytest.mark.parametrize("kind", ["blocks", "states"])
def test_prefix_cache_of_a_common_beginning(kind: str) -> None:
    """A state is kept where the second has left the first's text; blocks are there at once."""
    setting = Setting(kind, 100, 1, 64, snapshots=9, stride=1000)
    common = [1, 2] * 10
    for i in range(3):
        setting.add([*common, *[i] * 5], 1)
        setting.finish()
    cached = [sequence.metrics.cached_tokens for sequence in setting.sequences]
    assert cached == {"blocks": [0, 20, 20], "states": [0, 0, 20]}[kind]


def test_snapshots_of_a_long_prompt() -> None:
    setting = Setting("states", 100, 1, 8, snapshots=9, stride=20)
    setting.add([1, 2] * 35, 1)
    setting.finish()
    setting.add([1, 2] * 30 + [0], 1)
    setting.finish()
    assert [sequence.metrics.cached_tokens for sequence in setting.sequences] == [0, 48]  # chunks of 8, at 24 and 48


def test_priority_and_preemption_order() -> None:
    setting = Setting("none", 8, 2, 64, snapshots=0, stride=1)
    for priority in (1, 1, 0):
        setting.add([2] * 9, 8, priority=priority)
    low, later, urgent = setting.sequences
    setting.step()
    assert setting.scheduler.running == [urgent, low] and setting.scheduler.waiting == [later]
    low.params = urgent.params = SamplingParams(max_tokens=20, ignore_eos=True)
    for _ in range(12):
        setting.step()
    assert (urgent.metrics.preemptions, low.metrics.preemptions) == (0, 1)
    assert low.metrics.queue_time is not None and low.metrics.queue_time > 0


def test_siblings_share_the_blocks_of_their_prompt() -> None:
    setting = Setting("none", 40, 4, 64, snapshots=0, stride=1)
    setting.add([1] * 10, 20, n=3)
    setting.step()
    assert [num for batch in setting.runner.batches for _, num in batch] == [9]  # the last token waits for the others
    setting.step()
    first, second, third = (sequence.cache.block_table for sequence in setting.sequences)
    assert first[:2] == second[:2] == third[:2] and len({first[2], second[2], third[2]}) == 3
    assert setting.blocks.num_free == 40 - 2 - 3
    setting.finish()


# --- the scheduler alone --------------------------------------------------------------------------------------------


def scheduler(num_blocks: int, seqs: int = 8, budget: int = 64) -> Scheduler:
    runner = FakeRunner(next_token, BLOCK, has_states=False)
    return Scheduler(runner, BlockManager(num_blocks, BLOCK), MAX_MODEL_LEN, range(seqs), budget)


def queued(scheduler: Scheduler, *lengths: int) -> list[Sequence]:
    sequences = [Sequence(i, [1] * length, SamplingParams(max_tokens=20)) for i, length in enumerate(lengths)]
    for sequence in sequences:
        scheduler.add(sequence)
    return sequences


def shares(scheduler: Scheduler) -> list[tuple[int, int]]:
    """A step as (request id, tokens), which is computed at once."""
    step = [(work.sequence.request_id, work.num_tokens) for work in scheduler.schedule()]
    for work in scheduler.scheduled:
        scheduler.update(work)
        if work.sequence.num_uncomputed == 0:
            work.sequence.append(1, None)
    return step


def test_token_budget_and_chunked_prefill() -> None:
    """Who decodes comes first; what is left goes to prompts in their order, the last of them cut into chunks."""
    one = scheduler(40, budget=10)
    queued(one, 6, 13, 4)
    assert [shares(one) for _ in range(3)] == [[(0, 6), (1, 4)], [(0, 1), (1, 9)], [(0, 1), (1, 1), (2, 4)]]


def test_the_watermark_is_left_to_those_that_run() -> None:
    """Four run, and the last free block is for the first of them that needs one."""
    one = scheduler(6)
    sequences = queued(one, 4, 4, 4, 4, 8)
    shares(one)
    assert one.running == sequences[:4] and one.waiting == sequences[4:] and one.watermark_blocks == 1
    two = scheduler(7)
    sequences = queued(two, 4, 4, 4, 4, 8)
    shares(two)
    assert two.running == sequences, "the watermark and two blocks are free"


def test_preemption_takes_the_last_in_the_queue() -> None:
    """Also for a text that is only read; what cannot get its blocks by it is refused."""
    one = scheduler(6)
    sequences = queued(one, 8, 8, 8)
    shares(one)
    assert one.running == sequences and one.blocks.num_free == 0
    shares(one)  # each needs a block for its next token
    assert one.running == sequences[:2] and one.waiting == sequences[2:] and one.num_preemptions == 1
    text = one.start_prefill_only([1] * 8, state_slot=9)
    assert one.running == sequences[:1] and one.waiting == sequences[1:] and one.num_preemptions == 2
    assert sequences[1].cache == CacheState() and sequences[1].metrics.preemptions == 1
    with pytest.raises(RequestError, match="A text of 24 tokens needs 6 blocks of the cache, and 4 are free"):
        one.start_prefill_only([1] * 24, state_slot=10)
    one.finish_prefill_only(text)
    assert one.blocks.num_free == 6 and one.waiting == sequences
