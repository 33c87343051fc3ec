"""A draft model: any family drafts for any other, and of one that is the model itself every token is accepted."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from conftest import answers, settle
from drafts import Spoiled, assert_all_is_free, draft_of
from fakes import FakeRunner

from tinyserve import LLM, SamplingParams, StructuredOutputs
from tinyserve.engine import Engine
from tinyserve.errors import UserError
from tinyserve.progress import size
from tinyserve.scheduling.block_manager import BlockManager
from tinyserve.scheduling.draft_model import PROBE_ONE_IN, RETRY_AFTER_STEPS, RETRY_DRAFT_TOKENS, DraftModel
from tinyserve.scheduling.prefix_cache import BlockPrefixCache, StatePrefixCache
from tinyserve.scheduling.scheduler import Scheduler
from tinyserve.scheduling.sequence import Sequence

FAMILIES = ["gpt2", "llama-grouped", "falcon-7b", "falcon-rw", "granite-moe", "granite-hybrid", "granite-hybrid-moe"]
PROMPTS = [checkpoints.token_ids(count, seed=count) for count in (7, 40, 20, 33)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=3, prompt_logprobs=1),
    SamplingParams(temperature=0.8, seed=7, max_tokens=25, ignore_eos=True, n=2),
    SamplingParams(temperature=0.6, seed=8, max_tokens=40, stop_token_ids=[7, 8, 9], logprobs=3),
    SamplingParams(temperature=0.5, seed=9, max_tokens=30, min_tokens=20, repetition_penalty=1.2, logit_bias={5: 2.0}),
]


def with_draft(folder: Path, draft: Path, dtype: str | None = None, num_tokens: int = 5, **options: Any) -> LLM:
    config = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": num_tokens}
    options = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 6} | options
    return LLM(folder, speculative_config=config | ({"dtype": dtype} if dtype else {}), **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_itself_is_always_right(name: str, folder_of: Callable[[str], Path], llm_of: Callable) -> None:
    """So its cache never holds anything but the text, its place and its random numbers are those of the model."""
    expected = answers(llm_of(name).generate(PROMPTS, PARAMS))
    for every in (0, 7):  # then with some of its draft tokens changed: it must find its way back to the text
        llm = with_draft(folder_of(name), folder_of(name))
        spoiled = Spoiled(llm, every, is_always_right=True)
        for _ in range(2):
            assert answers(llm.generate(PROMPTS, PARAMS)) == expected
        stats = llm.stats()
        assert stats.draft_tokens > 100 and (stats.draft_tokens == stats.accepted_tokens) == (every == 0)
        assert every == 0 or len(+spoiled.places) == 5, "wrong at every place"
        assert_all_is_free(llm)


@pytest.mark.parametrize("name", FAMILIES)
def test_any_family_drafts_for_any_other(name: str, folder_of: Callable[[str], Path], llm_of: Callable) -> None:
    """Mostly wrongly: these models have nothing in common. In small chunks, with an int8 copy as well."""
    expected = answers(llm_of(name).generate(PROMPTS, PARAMS))
    drafts = {FAMILIES[(FAMILIES.index(name) + step) % len(FAMILIES)]: None for step in (1, 3)} | {name: "int8"}
    for draft, dtype in drafts.items():
        llm = with_draft(folder_of(name), folder_of(draft), dtype, max_num_batched_tokens=12, max_num_seqs=3)
        Spoiled(llm)
        assert answers(llm.generate(PROMPTS, PARAMS)) == expected
        stats = llm.stats()
        assert stats.accepted_tokens < stats.draft_tokens
        if draft == name:  # its int8 copy is right in half of its drafts, as each is spoiled somewhere
            assert stats.accepted_tokens > 0.3 * stats.draft_tokens
        assert_all_is_free(llm)


@pytest.mark.parametrize("name", ["llama-grouped", "granite-hybrid"])
def test_drafts_beside_preemption(name: str, folder_of: Callable[[str], Path], llm_of: Callable) -> None:
    """The model's cache runs out, and its draft model's with it."""
    params = [SamplingParams(temperature=0.7, seed=i, max_tokens=60, ignore_eos=True, logprobs=2) for i in range(4)]
    draft = "granite-hybrid" if name == "llama-grouped" else "llama-grouped"
    for other in (name, draft):
        big = with_draft(folder_of(name), folder_of(other))
        plan = big.cache_plan
        memory = 13 * (plan.block_nbytes + plan.draft.block_nbytes) + 9 * plan.state_nbytes
        llm = with_draft(
            folder_of(name), folder_of(other), max_model_len=112, max_num_seqs=4,
            kv_cache_memory=memory + _draft_states(big, 4),
        )  # fmt: skip
        assert llm.cache_plan.num_blocks <= 13
        Spoiled(llm, 0, is_always_right=other == name)
        outputs = llm.generate(PROMPTS, params)
        assert answers(outputs) == answers(llm_of(name).generate(PROMPTS, params))
        assert sum(output.metrics.preemptions for output in outputs) > 0 and llm.stats().draft_tokens > 0
        assert_all_is_free(llm)


def _draft_states(llm: LLM, max_num_seqs: int) -> int:
    """The bytes of the states of a draft model that drafts for so many."""
    return llm.cache_plan.draft.state_nbytes * (max_num_seqs * 4 + 1)


@pytest.mark.parametrize("name", ["llama", "granite-hybrid"])
def test_drafts_keep_to_the_grammar(name: str, folder_of: Callable[[str], Path], llm_of: Callable) -> None:
    """The draft model has the same masks: it is right where the model is, and what is not allowed is never drafted."""
    llm = with_draft(folder_of(name), folder_of(name))
    Spoiled(llm, 0, is_always_right=True)
    specs: list[dict[str, Any]] = [{"regex": "[a-f]{3}(-[0-9]{2}){2,9}!"}, {"choice": ["yes", "no", "perhaps"]}]
    params = [
        SamplingParams(temperature=t, seed=1, max_tokens=40, structured_outputs=StructuredOutputs(**spec))
        for spec in specs
        for t in (0.0, 1.0)
    ]
    assert answers(llm.generate(PROMPTS, params)) == answers(llm_of(name).generate(PROMPTS, params))
    assert llm.stats().accepted_tokens > 20


def test_drawn_answers_keep_their_distribution(folder_of: Callable[[str], Path]) -> None:
    """All answers of four tokens from three, drawn 2000 times with drafts: chi-square against what each should have.

    A draft model that draws with other odds, and is right half the time, has no say in them.
    """
    llm = with_draft(folder_of("gpt2"), folder_of("llama"), max_num_seqs=8)
    Spoiled(llm, 0)
    prompt, allowed, temperature = PROMPTS[0], [11, 70, 150], 3.0
    draws = [
        SamplingParams(
            temperature=temperature, seed=1000 + i, max_tokens=4, ignore_eos=True, allowed_token_ids=allowed,
            logit_bias={11: 1.0},
        )
        for i in range(2000)
    ]  # fmt: skip
    counts = Counter(tuple(output.outputs[0].token_ids) for output in llm.generate([prompt] * len(draws), draws))
    stats = llm.stats()
    assert 0.2 < stats.accepted_tokens / stats.draft_tokens < 0.9

    odds: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(4):
        longer = {}
        for answer, likely in odds.items():
            logits = llm.logits([*prompt, *answer])[-1, allowed].astype(np.float64) + np.array([1.0, 0.0, 0.0])
            weights = np.exp((logits - logits.max()) / temperature)
            longer |= {(*answer, t): likely * w / weights.sum() for t, w in zip(allowed, weights, strict=True)}
        odds = longer
    common = [answer for answer, likely in odds.items() if likely * len(draws) >= 5]
    expected = np.array([odds[answer] for answer in common] + [1 - sum(odds[answer] for answer in common)])
    seen = np.array([counts[answer] for answer in common] + [len(draws) - sum(counts[answer] for answer in common)])
    freedom = len(common)
    assert freedom >= 8
    chi_square = float(((seen - len(draws) * expected) ** 2 / (len(draws) * expected + 1e-9)).sum())
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5, "four standard deviations"


def test_streams_closed_early_leave_nothing_behind(folder_of: Callable[[str], Path]) -> None:
    llm = with_draft(folder_of("granite-hybrid"), folder_of("granite-hybrid"))
    Spoiled(llm)
    streams = [llm.stream(prompt, SamplingParams(max_tokens=60, ignore_eos=True, seed=3)) for prompt in PROMPTS]
    for stream in streams:
        next(stream)
        next(stream)
        stream.close()
    settle(llm)
    assert_all_is_free(llm)
    again = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    assert len(llm.generate(PROMPTS[0], again)[0].outputs[0].token_ids) == 20


def test_draft_model_failure_fails_those_it_drafted_for(folder_of: Callable[[str], Path]) -> None:
    llm = with_draft(folder_of("llama"), folder_of("llama"))
    Spoiled(llm)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = answers(llm.generate(PROMPTS[0], params))
    runner = draft_of(llm).runner
    execute = runner.execute

    def fail(scheduled: Any) -> Any:
        runner.execute = execute  # type: ignore[method-assign]
        raise MemoryError("none left")

    runner.execute = fail  # type: ignore[method-assign]
    with pytest.raises(MemoryError, match="none left"):
        llm.generate(PROMPTS[0], params)
    assert_all_is_free(llm)
    assert answers(llm.generate(PROMPTS[0], params)) == expected


def test_a_shorter_context_ends_the_drafts(folder_of: Callable[[str], Path], llm_of: Callable, tmp_path: Path) -> None:
    raw = checkpoints.CONFIGS["llama"] | {"max_position_embeddings": 48}
    llm = with_draft(folder_of("llama"), checkpoints.write_folder(tmp_path / "short", raw))
    Spoiled(llm, 0, is_always_right=True)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    assert answers(llm.generate(PROMPTS[1], params)) == answers(llm_of("llama").generate(PROMPTS[1], params))
    assert 0 < llm.stats().draft_tokens < 48 - 40


# --- what is refused, and what it takes ---------------------------------------------------------------------------


def test_vocabularies_must_be_the_same(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    other = checkpoints.write_folder(tmp_path / "other", checkpoints.CONFIGS["llama"] | {"vocab_size": 300})
    with pytest.raises(UserError, match=r"other cannot draft for .*gpt2: its vocabulary has 300 tokens and .* 261"):
        with_draft(folder_of("gpt2"), other)
    renamed = checkpoints.write_folder(tmp_path / "renamed", checkpoints.CONFIGS["llama"])
    tokenizer = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (renamed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"renamed cannot draft for .*gpt2: token 65 is b'B' to the one and b'A'"):
        with_draft(folder_of("gpt2"), renamed)


@pytest.mark.parametrize(("name", "draft"), [("llama", "gpt2"), ("granite-hybrid", "granite-hybrid-moe")])
def test_its_memory_is_part_of_the_plan(name: str, draft: str, folder_of: Callable[[str], Path]) -> None:
    llm = with_draft(folder_of(name), folder_of(draft), max_num_seqs=3)
    plan, runner = llm.cache_plan, draft_of(llm).runner
    caches = [llm.engine.runner.cache, runner.cache]
    taken = [sum(array.nbytes for layer in cache.layers for array in layer) for cache in caches]
    assert plan.nbytes == sum(taken) and plan.draft.nbytes == taken[1]
    assert f"the draft model's, {size(taken[1])}" in str(plan)
    assert len({cache.num_blocks for cache in caches}) == 1
    limit = plan.nbytes // 4
    smaller = with_draft(folder_of(name), folder_of(draft), max_num_seqs=3, kv_cache_memory=limit)
    assert smaller.cache_plan.nbytes <= limit and smaller.cache_plan.num_blocks < plan.num_blocks


def test_a_dtype_of_its_own(folder_of: Callable[[str], Path]) -> None:
    llm = with_draft(folder_of("llama"), folder_of("llama"), "bfloat16")
    assert llm.dtype == "float32" and draft_of(llm).runner.cache.dtype == "bfloat16"


# --- with runners that compute nothing ----------------------------------------------------------------------------


def counting(sequence: Sequence) -> int:
    return len(sequence.token_ids)


def draft_model(kind: type[BlockPrefixCache], num_tokens: int = 4, budget: int = 64) -> DraftModel:
    blocks, runner = BlockManager(64, 16), FakeRunner(counting, has_states=kind is StatePrefixCache)
    prefix_cache = kind(blocks, *([range(4, 16)] if kind is StatePrefixCache else []))
    scheduler = Scheduler(runner, blocks, 512, range(4), budget, prefix_cache)
    return DraftModel(Engine(runner, scheduler, frozenset({99})), num_tokens)


def tireless(kind: type[BlockPrefixCache]) -> DraftModel:
    """One that drafts whether it pays or not."""
    proposer = draft_model(kind)
    proposer._draft_length = lambda sequence, most, num_sequences: most  # type: ignore[method-assign]
    return proposer


def sequence_of(length: int) -> Sequence:
    return Sequence(0, list(range(length)), SamplingParams(max_tokens=500))


def work(proposer: DraftModel) -> list[list[int]]:
    """The tokens of each step so far, and forget them."""
    batches, proposer.engine.runner.batches = proposer.engine.runner.batches, []
    return [[num_tokens for _, num_tokens in batch] for batch in batches]


@pytest.mark.parametrize("kind", [BlockPrefixCache, StatePrefixCache])
def test_only_what_is_new_is_computed(kind: type[BlockPrefixCache]) -> None:
    """All that decode share each step; after accepted draft tokens one token or two are new, after others a few."""
    proposer, sequences = tireless(kind), [sequence_of(20), sequence_of(30)]
    assert proposer.propose(sequences, [4, 3]) == [[20, 21, 22, 23], [30, 31, 32]]
    assert work(proposer) == [[20, 30], [1, 1], [1, 1], [1]]
    sequences[0].token_ids += [20, 21, 22, 23, 24]  # all were right
    sequences[1].token_ids += [30, 77]  # the second was not
    assert proposer.propose(sequences, [4, 4]) == [[25, 26, 27, 28], [32, 33, 34, 35]]
    assert work(proposer) == [[2, 2], [1, 1], [1, 1], [1, 1]]
    sequences[1].token_ids += [88]  # nor the first
    assert proposer.propose(sequences[1:], [1]) == [[33]]
    assert work(proposer) == [[1]]
    assert proposer.engine.scheduler.blocks.num_free == 64


@pytest.mark.parametrize("kind", [BlockPrefixCache, StatePrefixCache])
def test_a_long_prompt_is_read_a_step_at_a_time(kind: type[BlockPrefixCache]) -> None:
    """While others have their drafts."""
    proposer, reader, other = tireless(kind), sequence_of(300), sequence_of(10)
    reader.token_ids[0] = 77  # nothing of it is known
    assert proposer.propose([other], [2]) == [[10, 11]]
    work(proposer)
    other.token_ids += [10, 11, 12]
    assert proposer.propose([other, reader], [3, 3]) == [[13, 14, 15], []]
    assert work(proposer) == [[2, 62], [1], [1]]
    found = [proposer.propose([reader], [3]) for _ in range(2)]
    assert found == [[[]], [[300, 301, 302]]], "the last few come in one go"
    assert work(proposer) == [[64], [64], [64], [46], [1], [1]]


def test_it_stops_where_drafts_do_not_pay() -> None:
    """By what steps took, and by how many were accepted; now and then it looks again, and then no more."""
    proposer = draft_model(BlockPrefixCache)
    tried: list[int] = []
    clock = {"own": 0.1}
    proposer.draft_cost.predict = lambda num_tokens: clock["own"]  # type: ignore[method-assign]
    proposer.draft_cost.record_step = lambda num_tokens, seconds: None  # type: ignore[method-assign]
    for rows in (1, 5, 9):
        proposer.record_step(rows, 1.0 + 0.1 * rows)
    sequence = sequence_of(20)
    for _ in range(200):
        [draft] = proposer.propose([sequence], [99])
        tried.append(len(draft))
        if draft:
            proposer.update_acceptance(sequence, len(draft), 0)
        sequence.token_ids.append(5)
    assert tried[0] > RETRY_DRAFT_TOKENS and sum(tried[:10]) <= 16
    later = [(step, count) for step, count in enumerate(tried) if count and step > 14]
    assert [count for _, count in later] == [RETRY_DRAFT_TOKENS] * len(RETRY_AFTER_STEPS)
    proposer.remove(sequence)
    clock["own"] = 5.0  # slower than the model itself: nothing could pay
    steps = RETRY_AFTER_STEPS[0] + 2
    begun = [any(proposer.propose([one], [99])[0] for _ in range(steps)) for one in map(sequence_of, [9] * 16)]
    assert begun.count(True) == 16 // PROBE_ONE_IN
