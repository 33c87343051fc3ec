"""Answers as async generators, on tiny models: many at once, ended in every way, and an engine that dies."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from checkpoints import BOS, USER
from conftest import settle
from damage import damaged_by
from hold import hold
from refusals import refused

from tinyserve import LLM, AsyncEngine, BeamSearchParams, SamplingParams
from tinyserve.errors import EngineDeadError, TinyserveError
from tinyserve.text.request import StreamChunk

PROMPTS = [checkpoints.token_ids(3 + 2 * i, seed=i) for i in range(12)]


@pytest.fixture
def llm(llm_of: Callable[..., LLM]) -> Iterator[LLM]:
    """Every test leaves the engine empty, and its blocks free."""
    model = llm_of("granite-hybrid")
    yield model
    gc.collect()
    settle(model)
    assert not model.engine.has_work() and not model.thread._sinks
    assert model.engine.scheduler.blocks.num_free == model.engine.scheduler.blocks.num_blocks


@pytest.fixture
def own_llm(folder_of: Callable[[str], Path]) -> LLM:
    """A model that a test may break."""
    return LLM(folder_of("llama"), dtype="float32", num_threads=1, max_num_seqs=4)


def greedy(max_tokens: int = 12, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **{"ignore_eos": "stop" not in options} | options)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 60))


async def collect(chunks: AsyncIterator[StreamChunk]) -> list[StreamChunk]:
    return [chunk async for chunk in chunks]


def tokens(chunks: list[StreamChunk], index: int = 0) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids if chunk.index == index]


def test_batch_invariance_of_many_at_once(llm: LLM) -> None:
    expected = llm.generate(PROMPTS, greedy())

    async def main() -> None:
        engine = AsyncEngine(llm)
        answers = await asyncio.gather(*(collect(engine.generate(prompt, greedy())) for prompt in PROMPTS))
        for chunks, output in zip(answers, expected, strict=True):
            assert tokens(chunks) == output.outputs[0].token_ids
            assert "".join(map(str, chunks)) == output.outputs[0].text
            assert [chunk.finish_reason for chunk in chunks[-2:]] == [None, "length"]
            assert chunks[-1].metrics.output_tokens == 12 and len(chunks[3].metrics.token_times) == 4
        assert engine._jobs == {} and not engine._router._subscribers
        before = engine.stats()
        assert before.num_running == 0 and before.output_tokens >= 24 * len(PROMPTS)

    run(main())
    run(main())  # in another event loop


def test_a_chat_and_several_answers(llm_of: Callable[..., LLM]) -> None:
    llm = llm_of("llama")
    messages = [{"role": "user", "content": "hi"}]
    params = SamplingParams(n=3, seed=5, max_tokens=9, ignore_eos=True)
    expected = [answer.token_ids for answer in llm.chat(messages, params)[0].outputs]
    assert len({tuple(answer) for answer in expected}) == 3

    async def main() -> None:
        chunks = await collect(AsyncEngine(llm).chat(messages, params))
        assert [tokens(chunks, i) for i in range(3)] == expected
        assert sorted(chunk.index for chunk in chunks if chunk.finish_reason) == [0, 1, 2]
        one = await collect(AsyncEngine(llm).generate([BOS, USER, *b"hi\n"], greedy()))
        assert tokens(one) == llm.chat(messages, greedy())[0].outputs[0].token_ids

    run(main())


def test_beam_searches_beside_others(llm: LLM) -> None:
    """Each finds what it finds alone, though their beams and a stream share the engine's steps."""
    params = BeamSearchParams(beam_width=3, max_tokens=10)
    expected = llm.beam_search(["The other one", *PROMPTS[:3]], params)

    async def main() -> None:
        engine = AsyncEngine(llm)
        searches = [engine.beam_search(prompt, params) for prompt in ("The other one", *PROMPTS[:3])]
        *found, chunks = await asyncio.gather(*searches, collect(engine.generate(PROMPTS[4], greedy(40))))
        assert found == expected and engine._jobs == {}
        assert tokens(chunks) == llm.generate(PROMPTS[4], greedy(40))[0].outputs[0].token_ids
        for bad in ([], [1] * 1000):
            with refused("prompt"):
                await engine.beam_search(bad, params)
        with refused("params"):
            await engine.beam_search([1], greedy())  # type: ignore[arg-type]

    run(main())


@pytest.mark.parametrize("end", ["cancel", "abort", "abort while requests are made"])
def test_a_beam_search_can_be_ended(llm: LLM, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = llm.make_request, [0]

    async def main() -> None:
        engine, begun = AsyncEngine(llm), asyncio.Event()
        loop = asyncio.get_running_loop()

        def counted(*arguments: Any) -> Any:
            made[0] += 1
            if made[0] == 12:  # one that checks the prompt, one for the prompt, and three for each token
                if end == "abort while requests are made":
                    asyncio.run_coroutine_threadsafe(engine.abort("mine"), loop).result(10)
                loop.call_soon_threadsafe(begun.set)
            return make(*arguments)

        monkeypatch.setattr(llm, "make_request", counted)
        params = BeamSearchParams(beam_width=3, max_tokens=90, ignore_eos=True)
        task = asyncio.create_task(engine.beam_search(PROMPTS[1], params, request_id="mine"))
        await begun.wait()
        if end == "cancel":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await engine.abort("mine")
            output = await task
            assert [sequence.finish_reason for sequence in output.sequences] == ["abort"] * 3
            scores = [sequence.score for sequence in output.sequences]
            lengths = {len(sequence.logprobs) for sequence in output.sequences}
            assert scores == sorted(scores, reverse=True) and len(lengths) == 1 and 3 <= min(lengths) < 90
            if end == "abort while requests are made":
                assert lengths == {4} and made[0] == 14
        settle(llm)
        assert engine._jobs == {} and not llm.engine.has_work()

    run(main())


def test_stop_strings(llm_of: Callable[..., LLM]) -> None:
    """The engine is a step ahead when one is found, and nothing of that step shows."""
    llm = llm_of("llama")
    full = llm.generate("The other one", greedy(40))[0].outputs[0].text
    stop = full[len(full) // 2 :][:3]

    async def main() -> None:
        chunks = await collect(AsyncEngine(llm).generate("The other one", greedy(40, stop=stop)))
        assert "".join(map(str, chunks)) == full[: full.index(stop)]
        assert (chunks[-1].finish_reason, chunks[-1].stop_reason) == ("stop", stop)
        assert sum(chunk.finish_reason is not None for chunk in chunks) == 1

    run(main())


@pytest.mark.parametrize("end", ["leave", "close", "cancel", "abort"])
def test_every_way_to_end_a_request(llm: LLM, end: str) -> None:
    """Leaving the loop, closing, a cancelled task, `abort`: its blocks are free before the next step."""
    free, steps = llm.engine.scheduler.blocks.num_free, llm.stats().steps

    async def main() -> None:
        engine, begun = AsyncEngine(llm), asyncio.Event()

        async def until_cancelled() -> None:
            async for _ in engine.generate(PROMPTS[0], greedy(50)):
                begun.set()

        with hold(llm, after=1) as held:
            if end == "cancel":
                task = asyncio.create_task(until_cancelled())
                await begun.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif end == "abort":
                chunks = []
                async for chunk in engine.generate(PROMPTS[0], greedy(50), request_id="mine"):
                    chunks.append(chunk)
                    if len(chunks) == 1:
                        assert held.started.wait(60)
                        await engine.abort("mine")
                        held.release.set()  # it tells the end
                assert chunks[-1].finish_reason == "abort" and len(tokens(chunks)) == 2
            else:
                stream = engine.generate(PROMPTS[0], greedy(50))
                async for _ in stream:
                    break
                if end == "close":
                    await stream.aclose()
                del stream
            await asyncio.sleep(0)  # asyncio closes what was left in a task of its own
            await asyncio.sleep(0)
        settle(llm)
        assert llm.engine.scheduler.blocks.num_free == free and not llm.engine.has_work()
        assert engine._jobs == {} and llm.stats().steps <= steps + 2
        await engine.abort("nobody")

    run(main())


def test_what_is_refused(llm: LLM) -> None:
    async def main() -> None:
        engine = AsyncEngine(llm)
        for prompt in ([], [1] * 1000, [-1], None):
            with refused("prompt"):
                await collect(engine.generate(prompt, greedy()))
        with refused("sampling_params"):
            await collect(engine.generate([1], {"temperature": 0}))  # type: ignore[arg-type]
        first = engine.generate([1], greedy(50), request_id="a")
        await anext(first)
        with refused("request_id", "request 'a' already"):
            await collect(engine.generate([1], greedy(), request_id="a"))
        await first.aclose()
        assert len(tokens(await collect(engine.generate([1], greedy(), request_id="a")))) == 12

    run(main())


def test_a_long_prompt_tells_how_far_it_is(folder_of: Callable[[str], Path]) -> None:
    llm = LLM(folder_of("llama"), dtype="float32", max_num_batched_tokens=16, num_threads=1)
    heard: list[tuple[int, int]] = []

    async def main() -> None:
        async with AsyncEngine(llm) as engine:
            await collect(engine.generate([1] * 50, greedy(2), on_prefill=lambda *told: heard.append(told)))

    run(main())
    assert heard == [(16, 50), (32, 50), (48, 50)]
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate([1])


def test_text_never_holds_up_a_step(own_llm: LLM) -> None:
    """Whoever makes text of the first token waits here until the engine has computed the last."""
    waited: list[int] = []
    detokenizer_of = own_llm.tokenizer.detokenizer

    def slow(*arguments: Any, **options: Any) -> Any:
        detokenizer = detokenizer_of(*arguments, **options)
        push = detokenizer.push

        def wait(token: int) -> str:
            ready = threading.Event()
            for _ in range(6000):
                if own_llm.stats().requests == len(PROMPTS):
                    break
                ready.wait(0.01)
            waited.append(own_llm.stats().requests)
            return push(token)

        detokenizer.push = wait
        return detokenizer

    own_llm.tokenizer.detokenizer = slow  # type: ignore[method-assign]
    outputs = own_llm.generate(PROMPTS, greedy())
    assert waited and set(waited) == {len(PROMPTS)}
    assert all(output.outputs[0].text for output in outputs)


def test_engine_failure_harms_no_other_request(own_llm: LLM) -> None:
    expected = own_llm.generate([PROMPTS[0]], greedy(40))[0].outputs[0].token_ids
    token = next(token for token in PROMPTS[1] if token not in PROMPTS[0] + expected)

    async def main() -> None:
        engine = AsyncEngine(own_llm)
        with hold(own_llm, after=1):
            stream = engine.generate(PROMPTS[0], greedy(40))
            first = await anext(stream)
            harmful = asyncio.create_task(collect(engine.generate(PROMPTS[1], greedy(40))))
            await asyncio.sleep(0)  # it is queued
        with pytest.raises(TinyserveError, match="not numbers"):
            await harmful
        assert tokens([first, *await collect(stream)]) == expected
        engine.check_health()

    with damaged_by(token, own_llm):
        run(main())


def test_engine_death_reaches_everybody(own_llm: LLM) -> None:
    async def main() -> None:
        engine = AsyncEngine(own_llm)

        def die() -> bool:
            raise RuntimeError("a mistake of the engine's own")

        with hold(own_llm, after=1):
            tasks = [asyncio.create_task(collect(engine.generate(prompt, greedy(100)))) for prompt in PROMPTS]
            stream = engine.generate(PROMPTS[0], greedy(100))
            await anext(stream)
            own_llm.engine.has_work = die  # type: ignore[method-assign]
        for task in tasks:
            with pytest.raises(EngineDeadError, match="a mistake"):
                await task
        with pytest.raises(EngineDeadError, match="a mistake"):
            await collect(stream)
        with pytest.raises(EngineDeadError, match="a mistake"):
            await collect(engine.generate([1], greedy()))
        with pytest.raises(EngineDeadError, match="a mistake"):
            engine.check_health()

    run(main())


def test_a_loop_that_was_closed(own_llm: LLM) -> None:
    """Its requests end by themselves: nobody reads them any more."""
    loop = asyncio.new_event_loop()
    with hold(own_llm, after=1):
        stream = AsyncEngine(own_llm).generate(PROMPTS[0], greedy(110))
        loop.run_until_complete(anext(stream))
        loop.close()
    for _ in range(1000):
        if own_llm.stats().num_running == 0:
            break
        threading.Event().wait(0.01)
    settle(own_llm)
    assert own_llm.stats().num_running == 0 and own_llm.stats().output_tokens < 110
