"""The whole chain, for requests of all kinds in one batch: against NumPy, vLLM's formulas, transformers, statistics."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from arrays import assert_drawn_from, random
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Oracle

from tinyserve import LLM
from tinyserve.sampler import DAMAGED, NOTHING_LEFT, Sampler, settings_of
from tinyserve.sampling_params import SamplingParams
from tinyserve.scheduling.sequence import Sampled, Sequence
from tinyserve.tensor import _jit
from tinyserve.tensor import reference_sampling as reference
from tinyserve.tensor.logits_processors import allow, penalise
from tinyserve.tensor.sampling import FILTERS, PROCESSORS

EOS = 11


def sequence(request_id: int = 0, prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **options: Any):
    made = Sequence(request_id, list(prompt), SamplingParams(**{"max_tokens": 1000} | options))
    made.token_ids += output
    return made


def with_bad_words(made: Sequence, words: list[list[int]]) -> Sequence:
    made.bad_words = words
    return made


def one(logits: np.ndarray, made: Sequence, mask: np.ndarray | None = None) -> Sampled:
    [sampled] = Sampler(frozenset({EOS})).sample([made], logits[None].copy(), [mask])
    return sampled


def packed(allowed: np.ndarray, words: int | None = None) -> np.ndarray:
    """Booleans as words of 32 bits, the first token in the lowest."""
    bits = np.zeros((words or -(-allowed.size // 32)) * 32, bool)
    bits[: allowed.size] = allowed[: bits.size]
    return np.packbits(bits, bitorder="little").view(np.uint32)


# --- the kernels ----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    vocab=st.sampled_from([1, 15, 16, 17, 31, 32, 33, 100, 1000, 4099]),
    density=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),
    missing=st.integers(-2, 3),
    seed=st.integers(0, 99),
)
def test_a_mask_is_its_twin(vocab: int, density: float, missing: int, seed: int) -> None:
    """Masks may be shorter than the vocabulary, as a tokenizer may, or longer."""
    _jit.set_threads(2)
    logits, random = (
        np.random.default_rng(seed).standard_normal((4, vocab), dtype=np.float32),
        np.random.default_rng(seed),
    )
    logits[1, ::3] = -np.inf
    words = max(1, -(-vocab // 32) - missing)
    masks = np.stack([packed(random.random(vocab) < density, words) for _ in range(3)])
    rows = np.array([3, 0, 1])
    expected = logits.copy()
    reference.allow(expected, rows, masks)
    allow(logits, rows, masks)
    np.testing.assert_array_equal(logits, expected)


@settings(max_examples=200, deadline=None)
@given(
    vocab=st.sampled_from([1, 2, 17, 1000]),
    prompt=st.integers(0, 50),
    output=st.integers(0, 50),
    repetition=st.sampled_from([1e-29, 0.5, 1.0, 1.1, 2.0, 1e29]),
    frequency=st.sampled_from([-2.0, 0.0, 0.1, 2.0]),
    presence=st.sampled_from([-2.0, 0.0, 0.3, 2.0]),
    seed=st.integers(0, 99),
)
def test_penalties_are_their_twin_bit_for_bit(
    vocab: int, prompt: int, output: int, repetition: float, frequency: float, presence: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    row = random.standard_normal(vocab, dtype=np.float32) * 5
    row[random.random(vocab) < 0.1] = random.choice([0.0, -0.0, -np.inf])
    seen = random.integers(vocab, size=prompt), random.integers(vocab, size=output)
    penalties = np.float32(repetition), np.float32(frequency), np.float32(presence)
    expected = row.copy()
    reference.penalise(expected, *seen, *penalties)
    penalise(row, *seen, *penalties)
    np.testing.assert_array_equal(row, expected)


def test_penalties_by_the_formulas_of_vllm_and_transformers(oracle: Oracle) -> None:
    torch = oracle("torch")
    process = oracle("transformers").generation.logits_process
    rng = np.random.default_rng(6)
    for _ in range(50):
        row, prompt, output = random(3, 500) * 4, rng.integers(500, size=40), rng.integers(500, size=300)
        repetition, frequency, presence = rng.uniform(0.5, 2), rng.uniform(-2, 2), rng.uniform(-2, 2)
        got = row.copy()
        penalise(got, prompt, output, np.float32(repetition), np.float32(frequency), np.float32(presence))
        # vllm/model_executor/layers/utils.py, apply_penalties
        prompt_mask, counts = np.bincount(prompt, minlength=500) > 0, np.bincount(output, minlength=500)
        penalties = np.where(prompt_mask | (counts > 0), repetition, 1.0)
        logits = row * np.where(row > 0, 1 / penalties, penalties)
        logits -= frequency * counts
        logits -= presence * (counts > 0)
        np.testing.assert_allclose(got, logits, rtol=2e-6, atol=1e-5)
        theirs = process.RepetitionPenaltyLogitsProcessor(float(np.float32(repetition)))(
            torch.from_numpy(np.concatenate([prompt, output]))[None], torch.from_numpy(row)[None]
        )
        alone = row.copy()
        penalise(alone, prompt, output, np.float32(repetition), np.float32(0), np.float32(0))
        np.testing.assert_array_equal(alone, theirs[0].numpy())


# --- the chain ------------------------------------------------------------------------------------------------------


def exact(logits: np.ndarray, made: Sequence, mask: np.ndarray | None = None) -> np.ndarray:
    """Each token's probability by the whole chain, written once more, token by token, in Python's floats."""
    params, prompt, output = made.params, made.prompt_token_ids, made.output_token_ids
    left = {token: float(logit) for token, logit in enumerate(logits)}
    if mask is not None:
        left = {token: logit for token, logit in left.items() if mask[token // 32] >> (token % 32) & 1}
    if params.allowed_token_ids is not None:
        left = {token: logit for token, logit in left.items() if token in params.allowed_token_ids}
    left = {token: logit for token, logit in left.items() if token not in params.banned_token_ids}
    left = {
        token: logit for token, logit in left.items()
        if not any([*output, token][-len(word) :] == word for word in made.bad_words)
    }  # fmt: skip
    for token, bias in (params.logit_bias or {}).items():
        if token in left:
            left[token] += bias
    if len(output) < params.min_tokens:
        left = {token: logit for token, logit in left.items() if token not in (EOS, *params.stop_token_ids)}
    for token in left:
        if token in prompt or token in output:
            left[token] *= params.repetition_penalty if left[token] < 0 else 1 / params.repetition_penalty
        left[token] -= params.frequency_penalty * output.count(token)
        left[token] -= params.presence_penalty * (token in output)
    ids = np.array(list(left))
    [asked] = settings_of([made], [()])
    kept = ids[reference.keep(np.array([left[token] for token in ids]), asked)]
    weights = np.exp((np.array([left[token] for token in kept]) - max(left.values())) / params.temperature)
    probabilities = np.zeros(len(logits))
    probabilities[kept] = weights / weights.sum()
    return probabilities


EVERYTHING: dict[str, Any] = {
    "temperature": 1.3, "top_k": 60, "top_p": 0.95, "min_p": 0.002, "typical_p": 0.97, "top_n_sigma": 3.0,
    "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": -0.2, "min_tokens": 5,
    "logit_bias": {3: 2.5, 9: 4.0, 150: -5.0}, "banned_token_ids": [0, 9, 200],
    "allowed_token_ids": list(range(250)), "stop_token_ids": [17],
    "bad_words": ["of a tokenizer's making"],
}  # fmt: skip
BAD_WORDS = [[7, 3, 8], [12], [7, 13], [3, 999], [250, 6, 6, 7, 3, 14]]


@pytest.mark.parametrize(("seeds", "draws"), [("given", 100_000), ("none", 10_000)])
def test_the_whole_chain_draws_as_often_as_it_should(seeds: str, draws: int) -> None:
    """Chi-square over 100,000 requests of neighbouring seeds, or fewer of none, that ask for everything at once."""
    batch = 5000
    logits = random(5, 300) * 2
    prompt, output = (4, 5, 3, 250), (6, 6, 7, 3)
    mask = packed(np.arange(300) % 7 != 2)
    logits[EOS] = logits[17] = logits[9] = logits[0] = logits[8] = logits[12] = 9  # what is forbidden is likely
    sampler, ids = Sampler(frozenset({EOS})), []
    for start in range(0, draws, batch):
        numbers = range(start, start + batch)
        seeded = ({"seed": i if seeds == "given" else None} for i in numbers)
        made = [with_bad_words(sequence(i, prompt, output, **EVERYTHING | next(seeded)), BAD_WORDS) for i in numbers]
        ids += [sampled.token_id for sampled in sampler.sample(made, np.tile(logits, (batch, 1)), [mask] * batch)]
    probabilities = exact(logits, made[0], mask)
    assert 20 < (probabilities > 0).sum() <= 60
    assert_drawn_from(probabilities, np.array(ids))
    del made
    assert not sampler._processors  # what was made for a request goes with it


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}, EVERYTHING,
    {"temperature": 0.0, "repetition_penalty": 1.5, "logprobs": 3},
    {"temperature": 2.0, "typical_p": 0.5, "logprobs": 0}, {"temperature": 1.1, "allowed_token_ids": [5, 8]},
    {"temperature": 1.0, "min_tokens": 8, "logit_bias": {EOS: 100.0}}, {"temperature": 2.0, "top_n_sigma": 1.0},
]  # fmt: skip


def test_a_seed_gives_the_same_token_in_any_batch_on_any_number_of_threads() -> None:
    rng = np.random.default_rng(8)
    made = []
    for i in range(64):
        prompt, output = rng.integers(0, 2000, 20), rng.integers(0, 2000, i % 9)
        made.append(
            sequence(i, tuple(prompt.tolist()), tuple(output.tolist()), seed=i // 3, **OPTIONS[i % len(OPTIONS)])
        )
    masks = [packed(rng.random(2000) < 0.7) if i % 4 == 1 else None for i in range(64)]
    logits = rng.standard_normal((64, 2000), dtype=np.float32) * 2
    results = []
    for threads in (1, 2):
        _jit.set_threads(threads)
        for size in (1, 3, 16, 64):
            sampler, sampled = Sampler(frozenset({EOS})), []
            for start in range(0, 64, size):
                rows = slice(start, start + size)
                sampled += sampler.sample(made[rows], logits[rows].copy(), masks[rows])
            results.append(sampled)
    assert all(result == results[0] for result in results)
    assert len({sampled.token_id for sampled in results[0]}) > 30


def test_who_was_interrupted_draws_the_same_again() -> None:
    """The number depends on the seed and the answer so far, not on what was drawn before."""
    logits, sampler = random(1, 1000), Sampler()
    for seed in (3, None):
        made = sequence(seed=seed)
        drawn = []
        for _ in range(10):
            [sampled] = sampler.sample([made], logits[None].copy())
            drawn.append(sampled.token_id)
            made.append(sampled.token_id, None)
        again = sequence(seed=made.seed, output=tuple(drawn[:6]))
        assert sampler.sample([again], logits[None].copy())[0].token_id == drawn[6]
        assert len(set(drawn)) > 5
    others = [Sampler().sample([sequence()], logits[None].copy())[0].token_id for _ in range(20)]
    assert len(set(others)) > 5  # without a seed, another program draws others
    together = sampler.sample([sequence(i) for i in range(20)], np.tile(logits, (20, 1)))
    assert len({sampled.token_id for sampled in together}) > 5


def test_log_probabilities_are_of_the_models_own_logits() -> None:
    """As vLLM's are: neither penalties nor bans nor the temperature change them."""
    logits, mask = random(2, 300) * 3, packed(np.arange(300) < 200)
    own = logits.astype(np.float64)
    own -= own.max() + np.log(np.exp(own - own.max()).sum())
    best = np.argsort(-own)[:5]
    sampled = one(logits, sequence(prompt=tuple(range(50)), logprobs=5, seed=1, **EVERYTHING), mask)
    assert sampled.logprobs is not None
    assert list(sampled.logprobs)[:5] == best.tolist()
    for token, value in sampled.logprobs.items():
        assert value == pytest.approx(own[token], abs=1e-5)


def test_requests_of_all_kinds_share_a_model(llm_of: Callable[..., LLM]) -> None:
    """Each answers as if it were alone, and its log-probabilities are those of `LLM.logits`, whatever it asks for."""
    llm, prompt = llm_of("llama"), [5, 9, 5, 60]
    params = [
        SamplingParams(**{"seed": i, "max_tokens": 20, "logprobs": 2, "stop_token_ids": [17]} | options)
        for i, options in enumerate([*OPTIONS, *OPTIONS])
    ]
    together = [output.outputs[0] for output in llm.generate([prompt] * len(params), params)]
    for one_of_them, asked in zip(together, params, strict=True):
        [alone] = llm.generate([prompt], asked)
        assert one_of_them == alone.outputs[0]
        rows = llm.logits(prompt + one_of_them.token_ids)[len(prompt) - 1 : -1].astype(np.float64)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        assert one_of_them.logprobs is not None
        for row, entry in zip(rows, one_of_them.logprobs, strict=True):
            for token, value in entry.items():
                assert value == pytest.approx(row[token], abs=1e-5)
    assert together[7].token_ids != together[1].token_ids
    assert set(together[6].token_ids) <= {5, 8}


def test_the_chain_has_every_parameter_that_changes_what_is_chosen() -> None:
    """The sampler and the twin go by these names; what the kernel does in which order, the twin's tests say."""
    stages: dict[str, set[str]] = {}
    for name, row in SamplingParams.rows.items():
        stages.setdefault(str(row.stage), set()).add(name)
    assert stages["draw"] == {*FILTERS, "temperature", "seed"}
    assert stages["mask"] | stages["bias"] | {"penalties"} == set(PROCESSORS)


# --- one step of it at a time ---------------------------------------------------------------------------------------


def test_greedy_obeys_everything_that_comes_before_the_temperature() -> None:
    logits = np.zeros(300, np.float32)
    logits[[5, 6, 7, EOS, 20]] = 10, 9, 8, 12, 11

    def greedy(mask: np.ndarray | None = None, output: tuple[int, ...] = (), **options: Any) -> int:
        return one(logits, sequence(output=output, temperature=0.0, **options), mask).token_id

    assert greedy() == EOS
    assert greedy(min_tokens=1) == 20 and greedy(min_tokens=1, output=(3,)) == EOS
    assert greedy(min_tokens=3, output=(3, 3), stop_token_ids=[20]) == 5
    assert greedy(min_tokens=3, ignore_eos=True) == EOS  # it ends nothing
    assert greedy(banned_token_ids=[EOS, 20]) == 5
    assert greedy(allowed_token_ids=[6, 7]) == 6 and greedy(allowed_token_ids=[6, 7], banned_token_ids=[6]) == 7
    assert greedy(logit_bias={7: 5}) == 7 and greedy(logit_bias={EOS: -100, 20: -100}) == 5
    assert greedy(logit_bias={7: 100}, banned_token_ids=[7]) == EOS
    assert greedy(mask=packed(np.arange(300) == 7), logit_bias={5: 100}) == 7
    assert greedy(mask=packed(np.arange(300) < 6)) == 5
    assert greedy(output=(EOS,), presence_penalty=2, allowed_token_ids=[EOS, 20]) == 20
    assert greedy(output=(EOS, EOS, 20), frequency_penalty=0.9, allowed_token_ids=[EOS, 20]) == EOS
    assert greedy(output=(EOS, EOS, EOS, 20), frequency_penalty=0.9, allowed_token_ids=[EOS, 20]) == 20
    assert greedy(output=(EOS,), repetition_penalty=1.1) == 20 and greedy(repetition_penalty=1.0, output=(EOS,)) == EOS


def test_bad_words_are_those_of_transformers(oracle: Oracle) -> None:
    """Few tokens, so that words are begun often, overlap, and are longer than what was said."""
    torch = oracle("torch")
    process = oracle("transformers").generation.logits_process
    rng, forbidden = np.random.default_rng(8), 0
    for _ in range(300):
        words = [rng.integers(4, size=rng.integers(1, 5)).tolist() for _ in range(rng.integers(1, 5))]
        output, logits = rng.integers(4, size=rng.integers(1, 8)), random(3, 6)
        theirs = process.NoBadWordsLogitsProcessor(words)(
            torch.from_numpy(output)[None], torch.from_numpy(logits)[None]
        )
        made = sequence(output=tuple(output.tolist()), bad_words="x", temperature=0.0)
        made = with_bad_words(made, [*words, [0, 6], [9]])  # a tokenizer may have more tokens than the model
        row = logits.copy()[None]
        Sampler().sample([made], row)
        np.testing.assert_array_equal(row, theirs.numpy())
        forbidden += int(np.isinf(row).sum())
    assert forbidden > 100


def test_the_prompt_counts_for_repetition_alone() -> None:
    logits = np.zeros(100, np.float32)
    logits[[5, 6]] = 10, 9

    def greedy(**options: Any) -> int:
        return one(logits, sequence(prompt=(5, 5, 5), temperature=0.0, **options)).token_id

    assert greedy(repetition_penalty=1.5) == 6
    assert greedy(presence_penalty=2.0) == greedy(frequency_penalty=2.0) == 5
    begun = with_bad_words(sequence(prompt=(5, 5, 5), temperature=0.0, bad_words="x"), [[5, 5]])
    assert one(logits, begun).token_id == 5


def test_a_token_beyond_the_logits_is_passed_over() -> None:
    """The user's API refuses it; whoever comes here another way writes to nobody's memory."""
    beyond = [10**9, 64]
    options: dict[str, Any] = {"banned_token_ids": beyond, "logit_bias": dict.fromkeys(beyond, 1.0)}
    assert one(np.arange(64, dtype=np.float32), sequence(temperature=0.0, **options)).token_id == 63
    options = {"allowed_token_ids": [*beyond, 3], "min_tokens": 1, "stop_token_ids": beyond}
    assert one(np.arange(64, dtype=np.float32), sequence(temperature=0.0, **options)).token_id == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_who_forbids_everything_is_told_so_and_harms_nobody(temperature: float) -> None:
    logits = np.tile(random(4, 100), (5, 1))
    logits[3, 50] = np.nan
    logits[4] = -np.inf
    nothing = packed(np.zeros(100, bool))
    options = [{}, {"allowed_token_ids": [EOS], "min_tokens": 2}, {}, {"banned_token_ids": [50]}, {}]
    made = [sequence(i, temperature=temperature, seed=3, logprobs=1, **o) for i, o in enumerate(options)]
    sampled = Sampler(frozenset({EOS})).sample(made, logits.copy(), [None, None, nothing, None, None])
    assert [one.error for one in sampled] == [None, NOTHING_LEFT, NOTHING_LEFT, None, DAMAGED]
    assert [one.is_request_error for one in sampled] == [False, True, True, False, False]
    assert sampled[0] == one(logits[0], made[0])
    assert sampled[3].token_id != 50 and sampled[1].logprobs is None
