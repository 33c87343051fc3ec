"""Log-probabilities of prompts and answers, and what is chosen by them: against the logits of the whole text."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from conftest import cache_bytes
from refusals import refused

from tinyserve import LLM, AsyncEngine, SamplingParams
from tinyserve.evaluation.perplexity import perplexity_of
from tinyserve.scheduling.sequence import Logprob

FAMILIES = ["gpt2", "llama", "falcon-7b", "granite-hybrid"]
PROMPTS = [checkpoints.token_ids(length, seed=length) for length in (1, 2, 40, 90)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize("name", FAMILIES)
def test_of_a_prompt(name: str, chunk: int, folder_of: Callable[[str], Path]) -> None:
    """Each token by those before it, whatever the chunks, beside answers, and never taken from the cache unread."""
    llm = LLM(folder_of(name), dtype="float32", max_num_batched_tokens=chunk, num_threads=1)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, prompt_logprobs=4, logprobs=2)
    llm.generate(PROMPTS, SamplingParams(max_tokens=1))  # all of them are in the cache now
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        rows = log_softmax(llm.logits(prompt + output.outputs[0].token_ids))
        first, *others = output.prompt_logprobs
        assert first is None and len(others) == len(prompt) - 1
        for token, row, found in zip(prompt[1:], rows, others, strict=False):
            best = np.argsort(-row)[:4].tolist()
            assert list(found)[:4] == best and set(found) == {*best, token}
            for one, logprob in found.items():
                assert logprob == pytest.approx(row[one], abs=1e-5)
                assert logprob.rank == 1 + (row > row[one]).sum()
                assert logprob.logprob == float(logprob)
                text = llm.tokenizer.decode([one], skip_special_tokens=False, continuation=True)
                assert logprob.decoded_token == text
        answer = output.outputs[0]
        said = list(zip(answer.token_ids, rows[len(prompt) - 1 : -1], answer.logprobs, strict=True))
        for token, row, found in said:
            assert next(iter(found)) == token and found[token] == pytest.approx(row[token], abs=1e-5)
        assert answer.cumulative_logprob == pytest.approx(sum(row[token] for token, row, _ in said), abs=1e-5)
        assert output.metrics.cached_tokens == 0
    assert llm.generate(PROMPTS[3], SamplingParams(max_tokens=1))[0].prompt_logprobs is None


def test_they_sum_to_the_perplexity(smollm2: Path) -> None:
    text = (Path(__file__).parents[1] / "data" / "english.txt").read_text(encoding="utf-8")
    llm = LLM(smollm2, max_model_len=256)
    ids = llm.tokenizer.encode(text)[:200]
    [output] = llm.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=0))
    total = math.fsum(row[token] for token, row in zip(ids[1:], output.prompt_logprobs[1:], strict=True))
    assert math.exp(-total / (len(ids) - 1)) == pytest.approx(perplexity_of(llm, ids, 256), rel=1e-5)


def test_prompt_logprobs_beside_preemption(folder_of: Callable[[str], Path], llm_of: Callable[..., LLM]) -> None:
    prompts = [checkpoints.token_ids(30, seed=i) for i in range(5)]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, prompt_logprobs=1)
    small = LLM(folder_of("llama"), dtype="float32", max_num_seqs=5, num_threads=1, max_model_len=96,
                kv_cache_memory=cache_bytes(llm_of("llama"), 12, 0))  # fmt: skip
    outputs = small.generate(prompts, params)
    assert sum(output.metrics.preemptions for output in outputs) > 0
    expected = llm_of("llama").generate(prompts, params)
    assert [output.prompt_logprobs for output in outputs] == [output.prompt_logprobs for output in expected]


def test_the_best_of_several(llm_of: Callable[..., LLM]) -> None:
    """The likeliest of as many answers, whose log-probabilities are not shown unless they were asked for."""
    llm = llm_of("llama")

    def generate(**options: Any) -> Any:
        [output] = llm.generate("The other", SamplingParams(seed=4, max_tokens=8, ignore_eos=True, **options))
        return output.outputs

    everything = sorted(generate(n=6, logprobs=0), key=lambda answer: -answer.cumulative_logprob)
    assert len({answer.text for answer in everything}) == 6
    best = generate(n=2, best_of=6)
    assert [answer.token_ids for answer in best] == [answer.token_ids for answer in everything[:2]]
    assert [answer.index for answer in best] == [0, 1]
    assert best[0].logprobs is None and best[0].cumulative_logprob is None
    shown = generate(n=1, best_of=6, logprobs=1)
    assert shown[0].cumulative_logprob == everything[0].cumulative_logprob and len(shown[0].logprobs) == 8
    with refused("best_of", "best_of is 3: use generate"):
        llm.stream("x", SamplingParams(best_of=3))
    with refused("best_of", "the likeliest is known at the end"):
        import asyncio

        asyncio.run(anext(AsyncEngine(llm).generate("x", SamplingParams(best_of=3))))


def test_a_stop_string_that_is_kept_and_one_that_comes_too_early(llm_of: Callable[..., LLM]) -> None:
    llm = llm_of("llama")

    def generate(max_tokens: int = 40, **options: Any) -> Any:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, **options)
        return llm.generate("The other one", params)[0].outputs[0]

    full = generate(ignore_eos=True).text
    stop = full[8:10]
    assert generate(stop=stop).text == full[: full.index(stop)]
    kept = generate(stop=stop, include_stop_str_in_output=True)
    assert kept.text == full[: full.index(stop)] + stop and kept.stop_reason == stop
    late = generate(stop=stop, min_tokens=len(kept.token_ids) + 5)
    assert len(late.token_ids) >= len(kept.token_ids) + 5 and late.text.startswith(kept.text)
    params = SamplingParams(temperature=0, max_tokens=40, stop=stop, include_stop_str_in_output=True)
    assert "".join(map(str, llm.stream("The other one", params))) == kept.text


def test_a_logprob_is_a_number_that_travels() -> None:
    one = Logprob(-1.5, 3, " a")
    again = pickle.loads(pickle.dumps(one))
    assert again == -1.5 and (again.rank, again.decoded_token) == (3, " a") and again.logprob + 1 == -0.5
