"""Prefix caching, preemption and siblings change no bit: tiny models of every family, in every dtype."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from conftest import DTYPES, answers, cache_bytes
from refusals import refused

from tinyserve import LLM, SamplingParams
from tinyserve.models.kv_cache import KVCache

FAMILIES = ["gpt2", "llama-grouped", "falcon-7b", "falcon-rw", "granite-moe", "granite-hybrid", "granite-hybrid-moe"]
# The log-probabilities of all tokens would differ with any bit of the logits; these are the most likely twenty.
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=20)
COMMON = checkpoints.token_ids(50, seed=7)
PROMPTS = [
    COMMON[:41],
    COMMON,
    COMMON[:33] + checkpoints.token_ids(20, seed=1),
    checkpoints.token_ids(5, seed=2),
    COMMON[:20] + checkpoints.token_ids(50, seed=3),
    COMMON,
    COMMON[:1],
]


def squeezed(llm: LLM, blocks: int) -> LLM:
    """The same with this many blocks to give: somebody holds all others."""
    llm.engine.scheduler.blocks.allocate(llm.engine.scheduler.blocks.num_free - blocks)
    return llm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_prefix_cache_and_preemption_change_no_bit(name: str, dtype: str, folder_of: Callable[[str], Path]) -> None:
    def build(**options: Any) -> LLM:
        return LLM(folder_of(name), dtype=dtype, **options)

    plain = build(enable_prefix_caching=False, num_threads=1)
    expected = answers([plain.generate([prompt], PARAMS)[0] for prompt in PROMPTS])
    assert not any(output.metrics.cached_tokens for output in plain.generate(PROMPTS, PARAMS))
    for threads, chunk in ((1, 512), (2, 7)):
        llm = build(num_threads=threads, max_num_batched_tokens=chunk)
        one_by_one = [llm.generate([prompt], PARAMS)[0] for prompt in PROMPTS]
        assert answers(one_by_one) == expected
        assert sum(output.metrics.cached_tokens > 0 for output in one_by_one) >= 2
        together = llm.generate(PROMPTS, PARAMS)
        assert answers(together) == expected
        assert sum(output.metrics.cached_tokens > 0 for output in together) >= 5
        # What an answer's tokens left behind is as good as a prompt's.
        turn = PROMPTS[3] + expected[3][0] + [1, 2]
        [fresh], [hit] = plain.generate([turn], PARAMS), llm.generate([turn], PARAMS)
        assert answers([hit]) == answers([fresh]) and hit.metrics.cached_tokens >= 16
    preemptions = 0
    for caching in (False, True):
        small = build(max_num_seqs=6, max_num_batched_tokens=32, enable_prefix_caching=caching, num_threads=1)
        crowded = squeezed(small, 8).generate(PROMPTS, PARAMS)
        assert answers(crowded) == expected
        preemptions += sum(output.metrics.preemptions for output in crowded)
    assert preemptions > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_prefix_cache_computes_only_what_is_new(name: str, dtype: str, folder_of: Callable[[str], Path]) -> None:
    """To the token, wherever in a block the one before has stopped; and to the bit."""
    llm = LLM(folder_of(name), dtype=dtype, num_threads=1)
    plain = LLM(folder_of(name), dtype=dtype, num_threads=1, enable_prefix_caching=False)
    text = checkpoints.token_ids(14, seed=9)
    computed = 0
    for length in (1, 2, 3, 1, 16, 5):
        [output] = llm.generate([text], PARAMS)
        assert output.metrics.cached_tokens == computed
        assert answers([output]) == answers(plain.generate([text], PARAMS))
        computed = len(text) + len(output.outputs[0].token_ids) - 1  # the last one is chosen, and not computed
        text = [*text, *output.outputs[0].token_ids, *checkpoints.token_ids(length, seed=length)]
        if len(text) > 100:
            return


@pytest.mark.parametrize("name", ["llama-grouped", "granite-hybrid"])
@pytest.mark.parametrize("caching", [True, False])
def test_preemption_of_two_hundred_requests_in_room_for_ten(
    name: str, caching: bool, folder_of: Callable[[str], Path], llm_of: Callable[..., LLM]
) -> None:
    alone = LLM(folder_of(name), dtype="float32", enable_prefix_caching=False, max_num_seqs=1, num_threads=1)
    lengths = [1 + 37 * i % 40 for i in range(200)]
    prompts = [COMMON[: i % 11] + checkpoints.token_ids(n, seed=i) for i, n in enumerate(lengths)]
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=1 + 13 * i % 50, ignore_eos=True) for i in range(200)]
    llm = LLM(
        folder_of(name), dtype="float32", max_num_seqs=32, num_threads=2, max_num_batched_tokens=64,
        enable_prefix_caching=caching,
    )  # fmt: skip
    outputs = squeezed(llm, 30).generate(prompts, params)
    expected = [alone.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert answers(outputs) == answers(expected)
    assert sum(output.metrics.preemptions for output in outputs) > 10
    assert llm.engine.scheduler.blocks.num_free == 30 and not llm.engine.has_work()


@pytest.mark.parametrize("name", ["llama-grouped", "granite-hybrid"])
def test_prefix_cache_of_a_chat(name: str, folder_of: Callable[[str], Path]) -> None:
    """Six turns: each computes the end of the answer before and its own message, and no more than a block besides."""
    raw = checkpoints.CONFIGS[name] | {"max_position_embeddings": 512}
    folder = checkpoints.write_folder(folder_of(name).parent / f"long-{name}", raw)
    llm = LLM(folder, dtype="float32", max_num_seqs=1, kv_cache_memory=40_000_000)
    history: list[int] = []
    computed: list[int] = []
    for turn in range(6):
        message = checkpoints.token_ids(9 + 5 * turn, seed=turn)
        history += message
        [output] = llm.generate([history], PARAMS)
        metrics = output.metrics
        computed.append(metrics.prompt_tokens - metrics.cached_tokens)
        # The answer's last token was sampled and not computed, as the end of a message is.
        new = len(message) + (1 if turn else 0)
        assert new <= computed[-1] <= new + (0 if name == "granite-hybrid" else llm.cache_plan.block_size)
        history += output.outputs[0].token_ids
    assert sum(computed) < len(history)


def test_prefix_cache_of_a_chat_template(folder_of: Callable[[str], Path]) -> None:
    """Where the template writes an answer otherwise than it was given, others go on from the prompt's end."""
    llm = LLM(folder_of("granite-hybrid"), dtype="float32", max_num_seqs=1)
    messages = [{"role": "user", "content": "Hello"}]
    [first] = llm.chat(messages, PARAMS)
    messages += [{"role": "assistant", "content": "Yes"}, {"role": "user", "content": "Why?"}]
    [second] = llm.chat(messages, PARAMS)
    assert second.metrics.cached_tokens == first.metrics.prompt_tokens


def test_siblings_are_answers_to_one_prompt(folder_of: Callable[[str], Path]) -> None:
    """Each is what a request of its own with its seed gives, however many fit at once."""
    for name in ("llama-grouped", "granite-hybrid"):
        llm = LLM(folder_of(name), dtype="float32", enable_prefix_caching=False, max_num_seqs=2)
        for length in (1, 16, 17, 40):
            params = SamplingParams(temperature=50.0, seed=3, max_tokens=12, n=4, logprobs=2, ignore_eos=True)
            [output] = llm.generate([checkpoints.token_ids(length, seed=4)], params)
            assert [answer.index for answer in output.outputs] == [0, 1, 2, 3] and output.finished
            singles = [
                llm.generate(
                    [output.prompt_token_ids],
                    SamplingParams(temperature=50.0, seed=3 + i, max_tokens=12, logprobs=2, ignore_eos=True),
                )[0]
                for i in range(4)
            ]
            assert answers([output]) == answers(singles)
            assert len({tuple(answer.token_ids) for answer in output.outputs}) == 4


def test_logits_between_two_requests(folder_of: Callable[[str], Path]) -> None:
    """They are computed in blocks of their own: what a request left behind is not written over."""
    for name in ("llama-grouped", "granite-hybrid"):
        llm = LLM(folder_of(name), dtype="float32")
        [first] = llm.generate([COMMON], PARAMS)
        llm.logits(checkpoints.token_ids(100, seed=9))
        turn = COMMON + first.outputs[0].token_ids + [3]
        [second] = llm.generate([turn], PARAMS)
        assert second.metrics.cached_tokens > 60
        plain = LLM(folder_of(name), dtype="float32", enable_prefix_caching=False)
        assert answers([second]) == answers(plain.generate([turn], PARAMS))


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "int8"])
def test_a_copied_block_holds_what_its_source_does(kept: str, folder_of: Callable[[str], Path]) -> None:
    llm = LLM(folder_of("granite-hybrid"), dtype="float32", kv_cache_dtype=kept)
    cache: KVCache = llm.engine.runner.cache
    llm.logits(COMMON)
    pages = next(layer for layer in cache.layers if hasattr(layer, "keys"))
    cache.copy_block(0, 5)
    for array in pages:
        if len(array):
            assert array[0].any() and (array[5] == array[0]).all()


def test_memory_is_shared_out_to_the_byte(folder_of: Callable[[str], Path]) -> None:
    for name in ("llama-grouped", "granite-hybrid"):
        llm = LLM(folder_of(name), dtype="float32", kv_cache_memory=9_000_000)
        arrays = [array for layer in llm.engine.runner.cache.layers for array in layer]
        assert sum(array.nbytes for array in arrays) == llm.cache_plan.nbytes <= 9_000_000
        plan = llm.cache_plan
        assert plan.num_snapshots * plan.state_nbytes <= 9_000_000 / 8
        assert (plan.num_snapshots > 0) == (name == "granite-hybrid") == ("snapshots" in str(plan))
        # A context that was asked for goes before snapshots.
        tight = LLM(folder_of(name), dtype="float32", max_model_len=128, kv_cache_memory=cache_bytes(llm, 8, 16))
        assert (tight.max_model_len, tight.cache_plan.num_snapshots) == (128, 0)


@pytest.mark.parametrize("priority", ["high", 1.5, [1], [1, 2, 3], [0, None]])
def test_a_priority_is_a_number_for_each(priority: Any, llm_of: Callable[..., LLM]) -> None:
    with refused("priority"):
        llm_of("llama").generate([[1], [2]], PARAMS, priority=priority)


def test_a_lower_priority_is_answered_first(folder_of: Callable[[str], Path]) -> None:
    llm = LLM(folder_of("llama"), dtype="float32", max_num_seqs=1)
    late, early = llm.generate([[1, 2], [1, 2]], PARAMS, priority=[1, 0])
    assert early.metrics.last_token < late.metrics.first_scheduled
    assert late.metrics.queue_time > early.metrics.queue_time
    assert answers([late]) == answers([early])


def test_special_tokens_alone_are_a_prompt(llm_of: Callable[..., LLM]) -> None:
    llm = llm_of("llama")
    [output] = llm.generate(["<|bos|><|eos|>"], PARAMS)
    assert output.prompt_token_ids == [checkpoints.BOS, checkpoints.EOS] and len(output.outputs[0].token_ids) == 24


def test_a_stream_is_one_answer(llm_of: Callable[..., LLM]) -> None:
    with refused("n"):
        llm_of("llama").stream([1], SamplingParams(n=2))
