"""Vectors of texts beside transformers, for all families; read in chunks, between others' steps, and given up."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from conftest import cache_bytes, settle
from hold import hold
from refusals import refused

from tinyserve import LLM, AsyncEngine, SamplingParams
from tinyserve.errors import EngineDeadError, TinyserveError
from tinyserve.models.layers import LayerNorm, RMSNorm
from tinyserve.tensor import reference
from tinyserve.tensor.norm import norm_rows
from tinyserve.text.pooling import mean_pool, sum_pool

TEXTS = [checkpoints.token_ids(length, seed=length) for length in (1, 2, 40)]
FREE = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)


def expected(folder: Path, ids: list[int]) -> np.ndarray:
    """The mean of transformers' last hidden states."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        states = model(torch.tensor([ids])).last_hidden_state[0]
    return np.asarray(states.mean(dim=0))


@pytest.mark.parametrize("name", checkpoints.CONFIGS)
def test_embeddings_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = checkpoints.save_with_transformers(tmp_path, checkpoints.CONFIGS[name])
    llm = LLM(folder, dtype="float32", max_num_batched_tokens=16, num_threads=1, max_num_seqs=2)
    for text, output in zip(TEXTS, llm.embed(TEXTS, normalize=False), strict=True):
        assert output.prompt is None and output.prompt_token_ids == text
        assert checkpoints.error(output.embedding, expected(folder, text)) < 1e-4


def test_what_an_output_says(llm_of: Callable[..., LLM]) -> None:
    """By default of length 1, as vLLM's and OpenAI's are; a text alone is one prompt."""
    llm = llm_of("llama")
    [output] = llm.embed("The other one")
    assert output.prompt == "The other one" and output.prompt_token_ids == llm.tokenizer.encode("The other one")
    assert output.embedding.shape == (120,) and output.embedding.dtype == np.float32
    assert np.linalg.norm(output.embedding) == pytest.approx(1)
    [raw] = llm.embed({"prompt_token_ids": output.prompt_token_ids}, normalize=False)
    assert np.linalg.norm(raw.embedding) != pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(raw.embedding / np.linalg.norm(raw.embedding), output.embedding, rtol=1e-5, atol=1e-7)
    assert llm.embed([]) == []


@pytest.mark.parametrize("name", ["llama", "granite-hybrid"])
def test_chunked_prefill_and_neighbours_change_nothing(
    name: str, llm_of: Callable[..., LLM], folder_of: Callable[[str], Path]
) -> None:
    llm, ids = llm_of(name), checkpoints.token_ids(100, seed=3)
    [whole] = llm.embed([ids])
    alone = llm.generate([TEXTS[2]], FREE)[0].outputs[0].token_ids
    cut = LLM(folder_of(name), dtype="float32", max_num_batched_tokens=7, num_threads=1, max_num_seqs=4)
    stream = cut.stream(TEXTS[2], FREE)
    said = list(next(stream).token_ids)
    for one in cut.embed([ids, ids]):
        np.testing.assert_allclose(one.embedding, whole.embedding, rtol=1e-5, atol=1e-6)
    assert said + [token for chunk in stream for token in chunk.token_ids] == alone
    assert cut.engine.scheduler.blocks.num_free == cut.engine.scheduler.blocks.num_blocks


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([[1], []], "A text to be read has 1 to 128 tokens, not 0."),
        ([[1], [1] * 129], "A text to be read has 1 to 128 tokens, not 129."),
        ([[1], [999]], "Token id 999 is outside"),
        ([[1], 3.5], "A prompt is text or a list of token ids"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_read(
    prompts: Any, sentence: str, llm_of: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = llm_of("llama")
    monkeypatch.setattr(llm.engine.runner, "prefill", None)
    with refused("prompt", sentence):
        llm.embed(prompts)
    with refused("normalize", "normalize is 1; it must be True or False"):
        llm.embed([[1]], normalize=1)  # type: ignore[arg-type]


def test_requests_go_on_between_chunks(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text holds up whoever decodes for a chunk at a time."""
    llm = LLM(folder_of("llama"), dtype="float32", max_num_batched_tokens=4, num_threads=1)
    events: list[str] = []
    runner: Any = llm.engine.runner
    prefill, execute = runner.prefill, runner.execute

    def reading(*args: Any) -> Any:
        events.append("prefill")
        return prefill(*args)

    def decoding(*args: Any) -> Any:
        events.append("execute")
        time.sleep(0.02)  # a whole answer of this model would take less than the text needs to come
        return execute(*args)

    monkeypatch.setattr(runner, "prefill", reading)
    monkeypatch.setattr(runner, "execute", decoding)

    async def main() -> None:
        engine = AsyncEngine(llm)
        with hold(llm, after=len(TEXTS[2]) // 4) as held:  # behind the first token
            stream = engine.generate(TEXTS[2], FREE)
            await anext(stream)
            call = llm.thread.call
            monkeypatch.setattr(llm.thread, "call", lambda work: (held.release.set(), call(work))[1])
            embedding = asyncio.create_task(engine.embed(checkpoints.token_ids(100)))
            async for _ in stream:
                pass
            await embedding

    asyncio.run(asyncio.wait_for(main(), 60))
    assert events.count("prefill") == 25
    during = "".join(event[0] for event in events).rstrip("p").lstrip("e")
    assert "ppp" not in during and during.count("pe") > 10


def test_preemption_for_a_text_that_is_read(folder_of: Callable[[str], Path]) -> None:
    """Who gives them up is computed again, and says the same."""
    for name in ("llama", "granite-hybrid"):
        plan = LLM(folder_of(name), dtype="float32", max_num_seqs=2)
        room = cache_bytes(plan, 9, 2)
        small = LLM(folder_of(name), dtype="float32", max_num_seqs=2, num_threads=1, max_model_len=128,
                    kv_cache_memory=room)  # fmt: skip
        prompts = [TEXTS[2], TEXTS[2][::-1]]
        alone = [small.generate([prompt], FREE)[0].outputs[0].token_ids for prompt in prompts]
        [vector] = small.embed([checkpoints.token_ids(120)])
        streams = [small.stream(prompt, FREE) for prompt in prompts]
        said = [list(next(stream).token_ids) for stream in streams]
        [again] = small.embed([checkpoints.token_ids(120)])
        np.testing.assert_array_equal(again.embedding, vector.embedding)
        for i, stream in enumerate(streams):
            said[i] += [token for chunk in stream for token in chunk.token_ids]
        assert said == alone
        assert small.stats().preemptions > 0
        settle(small)
        assert small.engine.scheduler.blocks.num_free == small.engine.scheduler.blocks.num_blocks


def test_many_at_once_from_an_event_loop(llm_of: Callable[..., LLM]) -> None:
    """More than there are threads: requests are still made meanwhile."""
    llm = llm_of("granite-hybrid")
    texts = [checkpoints.token_ids(9 + i, seed=i) for i in range(40)]
    alone = llm.embed(texts, normalize=False)

    async def main() -> None:
        engine = AsyncEngine(llm)
        tasks = [asyncio.create_task(engine.embed([text], normalize=False)) for text in texts]
        output = await engine.complete([1, 2], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 2
        for task, one in zip(tasks, alone, strict=True):
            [got] = await task
            np.testing.assert_array_equal(got.embedding, one.embedding)
        with refused("prompt"):
            await engine.embed([[]])

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_cancelled_task_ends_the_reading(folder_of: Callable[[str], Path]) -> None:
    llm = LLM(folder_of("llama"), dtype="float32", max_num_batched_tokens=4, num_threads=1)
    prefill, begun, goes_on, count = llm.engine.runner.prefill, threading.Event(), threading.Event(), [0]

    def slow(*arguments: Any) -> Any:
        count[0] += 1
        begun.set()
        assert goes_on.wait(30)
        return prefill(*arguments)

    llm.engine.runner.prefill = slow  # type: ignore[method-assign]

    async def main() -> None:
        task = asyncio.create_task(AsyncEngine(llm).embed([[1] * 100, [2] * 100]))
        await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        goes_on.set()

    asyncio.run(asyncio.wait_for(main(), 60))
    llm.engine.runner.prefill = prefill  # type: ignore[method-assign]
    assert len(llm.embed([[3] * 5])) == 1  # waits for its turn
    assert count == [1] and llm.engine.scheduler.blocks.num_free == llm.engine.scheduler.blocks.num_blocks
    with pytest.raises(TinyserveError, match="not wanted any more"):
        llm.embed([[1]], is_cancelled=lambda: True)
    llm.close()
    with pytest.raises(EngineDeadError):
        llm.embed([[1]])


def test_damaged_weights_are_told(folder_of: Callable[[str], Path]) -> None:
    llm = LLM(folder_of("llama"), dtype="float32", num_threads=1)
    normed = llm.model.normed
    llm.model.normed = lambda hidden: normed(hidden) * np.float32("nan")  # type: ignore[method-assign]
    with pytest.raises(TinyserveError, match="hidden states that are not numbers"):
        llm.embed([[1, 2]])


def test_mean_pool_of_chunk_sums() -> None:
    rows = np.random.default_rng(1).standard_normal((10, 6)).astype(np.float32)
    sums = [sum_pool(rows[:3]), sum_pool(rows[3:])]
    np.testing.assert_allclose(mean_pool(sums, 10, False), rows.mean(axis=0), rtol=1e-5, atol=1e-7)
    assert np.linalg.norm(mean_pool(sums, 10, True)) == pytest.approx(1)
    np.testing.assert_array_equal(mean_pool([np.zeros(3)], 1, True), np.zeros(3))


def test_norms_as_arrays_are_their_twins() -> None:
    rng = np.random.default_rng(2)
    x, weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 37), 37, 37))
    eps = np.float32(1e-5)
    rms, layer = RMSNorm(weight, eps).norm, LayerNorm(weight, bias, eps).norm
    np.testing.assert_allclose(norm_rows(x, rms), reference.rms_norm(x, weight, eps), rtol=1e-5)
    np.testing.assert_allclose(norm_rows(x, layer), reference.layer_norm(x, weight, bias, eps), rtol=1e-4, atol=1e-6)
