"""A request among 31 others is the request alone, to the bit: the default model, and a tiny hybrid in all dtypes.

Company, chunks, threads, what is found in the cache and being preempted may change when a token comes: nothing else.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from conftest import DTYPES, answers, cache_bytes

from tinyserve import LLM, RequestOutput, SamplingParams

COUNT = 32


def requests(vocab: int, longest: int, max_tokens: int, n: int = 1) -> tuple[list[list[int]], list[SamplingParams]]:
    """32 prompts of unequal lengths, some with a common beginning; every third is greedy, the others draw by a seed."""
    draw = np.random.default_rng(5)
    common = draw.integers(vocab, size=longest).tolist()
    prompts, params = [], []
    for i in range(COUNT):
        own = draw.integers(vocab, size=1 + 7 * i % 17).tolist()
        prompts.append((common[: longest - 9 * (i % 4)] if i % 6 == 0 else []) + own)
        one = SamplingParams(temperature=0.0, max_tokens=1 + max_tokens * (i % 5) // 4, ignore_eos=True, logprobs=20)
        kinds = ({}, {"temperature": 0.9, "top_p": 0.95}, {"temperature": 1.5, "top_k": 200, "min_p": 0.001})
        params.append(replace(one, seed=i, n=n if i % 3 == 1 else 1, **kinds[i % 3]))
    return prompts, params


def alone(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
    """Each by itself, and each answer of several as a request of its own."""
    outputs = []
    for prompt, one in zip(prompts, params, strict=True):
        for i in range(one.n):
            outputs += llm.generate([prompt], replace(one, n=1, seed=None if one.seed is None else one.seed + i))
    return outputs


def preemptions(outputs: list[RequestOutput]) -> int:
    return sum(output.metrics.preemptions for output in outputs)


def cached(outputs: list[RequestOutput]) -> list[int]:
    return [output.metrics.cached_tokens for output in outputs]


def test_batch_invariance_of_the_default_model(smollm2: Path) -> None:
    def build(**options: Any) -> LLM:
        return LLM(smollm2, dtype="int8", max_num_seqs=COUNT, **options)

    prompts, params = requests(49152, longest=40, max_tokens=5)
    assert len({len(prompt) for prompt in prompts}) > 12
    plain = build(num_threads=2, enable_prefix_caching=False)
    expected = answers(alone(plain, prompts, params))
    together = plain.generate(prompts, params)
    assert answers(together) == expected and not any(cached(together))
    # One thread, chunks that end in the middle of prompts and blocks, and what the first have left for the others.
    single = build(num_threads=1, max_num_batched_tokens=41)
    first = single.generate(prompts, params)
    assert answers(first) == expected
    again = single.generate(prompts[::6], params[::6])
    assert answers(again) == expected[::6] and min(cached(again)) >= 16
    # Room for three or four of them.
    small = build(num_threads=2, max_num_batched_tokens=100, kv_cache_memory=cache_bytes(plain, 5, 0), max_model_len=80)
    crowded = small.generate(prompts, params)
    assert answers(crowded) == expected
    assert preemptions(crowded) > 0 and any(cached(crowded))


@pytest.mark.parametrize(
    ("dtype", "kept"), [*((dtype, "auto") for dtype in DTYPES), ("float32", "int8"), ("w8a8", "int8")]
)
def test_batch_invariance_of_a_hybrid(dtype: str, kept: str, folder_of: Callable[[str], Path]) -> None:
    """With three answers to some of the prompts, each of which is a request of its own."""

    def build(**options: Any) -> LLM:
        return LLM(folder_of("granite-hybrid"), dtype=dtype, kv_cache_dtype=kept, **options)

    prompts, params = requests(checkpoints.VOCAB, longest=50, max_tokens=20, n=3)
    plain = build(num_threads=1, enable_prefix_caching=False, max_num_seqs=1)
    expected = answers(alone(plain, prompts, params))
    large = build(num_threads=2, max_num_seqs=COUNT, max_num_batched_tokens=90)
    together = large.generate(prompts, params)
    assert answers(together) == expected
    # What goes on from the answers is for the most part in the cache.
    turns = [output.prompt_token_ids + output.outputs[0].token_ids + [1, 2] for output in together][-8:]
    second = large.generate(turns, params[-8:])
    assert answers(second) == answers(alone(plain, turns, params[-8:]))
    assert sum(count > 0 for count in cached(second)) >= 6
    small = build(
        num_threads=1, max_num_seqs=12, max_num_batched_tokens=50, max_model_len=112,
        kv_cache_memory=cache_bytes(large, 8, 12),
    )  # fmt: skip
    crowded = small.generate(prompts, params)
    assert answers(crowded) == expected
    assert preemptions(crowded) > 3
