"""Guesses change nothing but the number of steps: the same bits for every family, whether right or wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from conftest import DTYPES, answers, cache_bytes
from hypothesis import given
from hypothesis import strategies as st

from tinyserve import LLM, SamplingParams
from tinyserve.errors import UserError
from tinyserve.sequence import Sequence
from tinyserve.speculation import LONGEST_PAUSE, NgramProposer

FAMILIES = ["gpt2", "llama-grouped", "falcon-7b", "falcon-rw", "granite-moe", "granite-hybrid", "granite-hybrid-moe"]
REPEATING = checkpoints.token_ids(7, seed=1) * 3
PROMPTS = [REPEATING, checkpoints.token_ids(20, seed=2), REPEATING[:12], [5, 6] * 9]
NGRAM = {"method": "ngram"}


def spoil(proposer: NgramProposer) -> None:
    """Tiny models repeat themselves so well that every guess would be right: some are made wrong, at any place."""
    propose = proposer.propose

    def sometimes_wrong(sequence: Sequence, room: int) -> list[int]:
        guesses, at = propose(sequence, room), len(sequence.token_ids) % 7
        if at < len(guesses):
            guesses[at] = (guesses[at] + 1) % checkpoints.VOCAB
        return guesses

    proposer.propose = sometimes_wrong  # type: ignore[method-assign]


def sequence_of(tokens: list[int]) -> Sequence:
    return Sequence(0, tokens, SamplingParams())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_guesses_change_no_bit(name: str, dtype: str, folder_of: Callable[[str], Path]) -> None:
    """Greedy and drawn, alone and together, in small chunks, with a cache that runs out, and over cached prefixes."""
    params = [
        SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, logprobs=3),
        SamplingParams(temperature=0.2, seed=7, max_tokens=40, ignore_eos=True, logprobs=3),
        SamplingParams(temperature=0, max_tokens=37, ignore_eos=True, logprobs=3, prompt_logprobs=1),
        SamplingParams(temperature=0, max_tokens=60, stop_token_ids=[7, 8, 9], logprobs=3),
    ]
    plain = LLM(folder_of(name), dtype=dtype, num_threads=1, enable_prefix_caching=False)
    expected = answers([plain.generate([p], one)[0] for p, one in zip(PROMPTS, params, strict=True)])
    guessed = right = 0
    for options in ({"num_threads": 1}, {"num_threads": 2, "max_num_batched_tokens": 24, "max_num_seqs": 3}):
        llm = LLM(folder_of(name), dtype=dtype, speculative_config=NGRAM, **options)
        spoil(llm._engine.proposer)
        for _ in range(2):  # the second time from the cache
            assert answers([llm.generate([p], one)[0] for p, one in zip(PROMPTS, params, strict=True)]) == expected
            assert answers(llm.generate(PROMPTS, params)) == expected
        stats = llm.stats()
        guessed, right = guessed + stats.guessed_tokens, right + stats.right_tokens
        assert stats.num_free_blocks == stats.num_blocks
    assert 0 < right < guessed


@pytest.mark.parametrize("name", ["llama-grouped", "granite-hybrid"])
def test_guesses_beside_preemption(name: str, folder_of: Callable[[str], Path]) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=2)
    plain = LLM(folder_of(name), dtype="float32", num_threads=1)
    small = LLM(folder_of(name), dtype="float32", num_threads=1, max_model_len=112, speculative_config=NGRAM,
                max_num_seqs=4, kv_cache_memory=cache_bytes(plain, 13, 9))  # fmt: skip
    outputs = small.generate(PROMPTS, params)
    assert answers(outputs) == answers(plain.generate(PROMPTS, params))
    assert sum(output.metrics.preemptions for output in outputs) > 0 and small.stats().right_tokens > 0


def test_a_stream_gets_one_token_a_chunk(folder_of: Callable[[str], Path]) -> None:
    llm = LLM(folder_of("gpt2"), dtype="float32", num_threads=1, speculative_config=NGRAM)
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    chunks = list(llm.stream(PROMPTS[3], params))
    assert [token for chunk in chunks for token in chunk.token_ids] == llm.generate([PROMPTS[3]], params)[0].outputs[
        0
    ].token_ids
    assert len(chunks[-1].metrics.token_times) == 50
    assert llm.stats().right_tokens > 0


def test_it_goes_on_as_the_text_did() -> None:
    proposer = NgramProposer(num_tokens=16, longest=3, shortest=2)
    assert proposer.propose(sequence_of([1, 2, 3, 4, 5, 1, 2]), 10) == [3, 4, 5, 1]
    assert proposer.propose(sequence_of([1, 2, 3, 4, 5, 1, 2]), 2) == [3, 4]
    assert proposer.propose(sequence_of([1, 2, 3, 9, 2, 3, 8, 1, 2, 3]), 1) == [9], "the longest match"
    assert proposer.propose(sequence_of([1, 2, 7, 1, 2, 8, 1, 2]), 1) == [8], "the latest one"
    assert proposer.propose(sequence_of([1, 2, 3]), 5) == proposer.propose(sequence_of([4]), 5) == []


def test_guesses_grow_and_wait() -> None:
    proposer, sequence = NgramProposer(num_tokens=16), sequence_of([1, 2, 3] * 20)
    sizes = []
    for _ in range(4):
        sizes.append(len(proposer.propose(sequence, 99)))
        proposer.learn(sequence, sizes[-1], sizes[-1])
    assert sizes == [4, 8, 16, 16]
    waits = []
    for _ in range(6):
        proposer.learn(sequence, 16, 0)
        steps = 0
        while not proposer.propose(sequence, 99):
            steps += 1
        waits.append(steps)
    assert waits == [4, 8, 16, 32, 64, LONGEST_PAUSE]


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 39))
def test_a_text_that_grows_is_read_like_a_whole_one(tokens: list[int], cut: int) -> None:
    whole, parts = NgramProposer(), NgramProposer()
    sequence = sequence_of(tokens[:cut])
    parts.propose(sequence, 9)
    sequence.token_ids = list(tokens)
    assert parts.propose(sequence, 9) == whole.propose(sequence_of(tokens), 9)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("ngram", "it is a mapping"), ({"methode": "ngram"}, "methode.*num_speculative_tokens"),
        ({"method": "eagle"}, "'eagle'; there is ngram"), ({"num_speculative_tokens": 0}, "0; it must be .* 1 to 64"),
        ({"prompt_lookup_max": 2.5}, "prompt_lookup_max is 2.5"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_min is 5 .* 4"),
    ],
)  # fmt: skip
def test_what_is_refused(config: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        LLM("nowhere", speculative_config=config)
