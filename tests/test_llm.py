"""The user's API on a tiny model of random weights: prompts, parameters, stops, streams, and what is refused."""

import copy
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from checkpoints import BOS, EOS, USER, VOCAB
from conftest import settle
from damage import damaged_by
from hold import hold
from refusals import refused

from tinyserve import LLM, RequestOutput, SamplingParams, StructuredOutputs
from tinyserve.engine import Update
from tinyserve.errors import CheckpointError, EngineDeadError, RequestError, TinyserveError, UserError
from tinyserve.models.config.costs import weight_bytes
from tinyserve.scheduling.sequence import Sequence
from tinyserve.tensor import _jit
from tinyserve.tensor.thread_pool import ThreadPool
from tinyserve.text.request import RequestState

TEXTS = ["The other one", "x", "日本語 and 👍🏽, then more of it than one block holds", "the", "<|user|>hi"]


@pytest.fixture
def llm(llm_of: Callable[..., LLM]) -> Iterator[LLM]:
    """Every test leaves the engine empty, and its blocks free."""
    model = llm_of("llama")
    yield model
    gc.collect()
    settle(model)
    assert not model.engine.has_work() and not model.thread._sinks
    assert model.engine.scheduler.blocks.num_free == model.engine.scheduler.blocks.num_blocks


def greedy(max_tokens: int = 12, **options: Any) -> SamplingParams:
    goes_on = not options.keys() & {"stop", "stop_token_ids"}
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **{"ignore_eos": goes_on} | options)


def answers(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


# --- prompts ------------------------------------------------------------------------------------------------------


def test_every_form_of_prompt(llm: LLM) -> None:
    """A text, texts, ids, lists of ids and a mixture of both: always a list of answers, in order."""
    ids = [llm.tokenizer.encode(text) for text in TEXTS]
    expected = answers([llm.generate(text, greedy())[0] for text in TEXTS])
    assert len({tuple(answer) for answer in expected}) == len(TEXTS)
    assert answers(llm.generate(TEXTS, greedy())) == expected
    assert answers(llm.generate(tuple(TEXTS), greedy())) == expected
    assert answers(llm.generate(ids, greedy())) == expected
    assert answers(llm.generate(ids[0], greedy())) == expected[:1]
    assert answers(llm.generate(np.array(ids[0]), greedy())) == expected[:1]
    assert answers(llm.generate([TEXTS[0], ids[1], TEXTS[2]], greedy())) == expected[:3]
    assert llm.generate([], greedy()) == []


def test_what_an_output_says(llm: LLM) -> None:
    [output] = llm.generate("The other", greedy(5))
    assert output.prompt == "The other" and output.finished
    assert output.prompt_token_ids == llm.tokenizer.encode("The other") == [ord("T"), ord("h"), 101, 32, 111, 257, 114]
    [answer] = output.outputs
    assert (answer.index, len(answer.token_ids), answer.finish_reason) == (0, 5, "length")
    assert answer.text == llm.tokenizer.decode(answer.token_ids)
    assert answer.logprobs is None and answer.stop_reason is None
    metrics = output.metrics
    assert (metrics.prompt_tokens, metrics.output_tokens) == (7, 5)
    assert metrics.arrival <= metrics.first_scheduled <= metrics.first_token <= metrics.last_token
    assert metrics.time_to_first_token > 0
    assert metrics.prefill_tokens_per_second > 0 and metrics.decode_tokens_per_second > 0
    [output] = llm.generate([1, 2, 3], greedy(1))
    assert output.prompt is None and output.prompt_token_ids == [1, 2, 3]
    assert output.metrics.decode_tokens_per_second is None


def test_parameters_for_each_prompt(llm: LLM) -> None:
    """More prompts than run at once, each with its own length; answers keep their order though they end out of it."""
    lengths = [9, 1, 5, 2, 14, 3, 3, 11, 1]
    prompts = [checkpoints.token_ids(3 + i, seed=i) for i in range(len(lengths))]
    outputs = llm.generate(prompts, [greedy(length) for length in lengths])
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(answer) for answer in answers(outputs)] == lengths
    for prompt, length, output in zip(prompts, lengths, outputs, strict=True):
        assert answers(llm.generate([prompt], greedy(length))) == answers([output])
    with refused("sampling_params", "2 prompts and 1 sampling_params"):
        llm.generate(["a", "b"], [greedy()])
    assert len(answers(llm.generate("a"))[0]) <= 128  # what the context has room for


@pytest.mark.parametrize("name", ["max_tokens", "temperature", "stop"])
def test_a_sampling_parameter_among_the_options_is_explained(llm: LLM, name: str) -> None:
    given: Any = {name: 3}
    messages = [{"role": "user", "content": "a"}]
    for method, prompt in ((llm.generate, "a"), (llm.stream, "a"), (llm.chat, messages)):
        with refused(name, f"give it as SamplingParams({name}=...)"):
            method(prompt, **given)  # type: ignore[operator]
    unknown: Any = {"temprature": 1}
    with pytest.raises(TypeError, match=r"generate\(\) got an unexpected keyword argument 'temprature'"):
        llm.generate("a", **unknown)


def test_a_model_is_a_context(folder_of: Callable[[str], Path]) -> None:
    with LLM(folder_of("llama"), dtype="float32", max_model_len=32, num_threads=1) as model:
        assert model.generate("a", greedy(2))
    with pytest.raises(EngineDeadError):
        model.generate("a", greedy(2))


def test_a_chat_is_its_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    ids = [BOS, USER, *b"hi\n"]
    assert llm.chat_prompt(messages) == ids
    [output] = llm.chat(messages, greedy())
    assert output.prompt_token_ids == ids
    assert answers([output]) == answers(llm.generate([ids], greedy()))
    other = [{"role": "user", "content": "ho"}]
    assert answers(llm.chat([messages, other], greedy())) == answers(
        llm.chat(messages, greedy()) + llm.chat(other, greedy())
    )
    assert "".join(map(str, llm.stream_chat(messages, greedy()))) == output.outputs[0].text
    bad: list[tuple[Any, str]] = [
        ([], "messages"), ([{"role": "user"}], "messages[0].content"), ([{"content": "x"}], "messages[0].role"),
        ([*messages, "hi"], "messages[1]"),
    ]  # fmt: skip
    for conversation, param in bad:
        with refused(param):
            llm.chat(conversation, greedy())


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path, checkpoints.CONFIGS["llama"])
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|eos|>"}')
    with refused("messages", "no chat template"):
        LLM(folder, dtype="float32").chat([{"role": "user", "content": "hi"}])


def test_bad_words_never_come(llm: LLM) -> None:
    """Whatever of an answer is forbidden, other tokens come in its place; words are counted behind the prompt only."""
    full = llm.generate(TEXTS[0], greedy(40))[0].outputs[0]
    for start in range(0, len(full.text) - 3, 4):
        word = full.text[start : start + 3].lstrip()
        if "\ufffd" in word or not word:
            continue
        [output] = llm.generate(TEXTS[0], greedy(40, bad_words=[word, "never in it"]))
        changed = output.outputs[0]
        assert word not in changed.text and len(changed.token_ids) == 40
        first = len(llm.tokenizer.encode(full.text[: full.text.index(word)]))
        assert changed.token_ids[:first] == full.token_ids[:first]
    assert answers(llm.generate(TEXTS[0], greedy(40, bad_words=["\x00\x01 \x02"]))) == [full.token_ids]


def test_bad_words_are_spelled_as_vllm_spells_them(smollm2: Path) -> None:
    llm = LLM(smollm2, max_model_len=256, num_threads=1)
    encode = llm.tokenizer.encode
    assert len(encode(" Paris")) == 1 and llm._input_processor.spellings(["  Paris", "\n"]) == [
        encode("Paris"), encode(" Paris"), encode("\n"), encode(" \n"),
    ]  # fmt: skip
    prompt = "The capital of France is"
    free, forbidden = (llm.generate(prompt, greedy(8, bad_words=words))[0].outputs[0] for words in ([], ["Paris"]))
    assert free.text.startswith(" Paris") and "Paris" not in forbidden.text
    assert forbidden.token_ids[0] != free.token_ids[0]


# --- where an answer ends -----------------------------------------------------------------------------------------


def test_stop_strings_never_leak(llm: LLM) -> None:
    """Every piece of the answer as a stop string, those that span tokens and those within one."""
    full = llm.generate(TEXTS[0], greedy(40))[0].outputs[0]
    assert len(full.text) > 20
    for start in range(0, len(full.text) - 4, 3):
        for length in (1, 2, 4):
            stop = full.text[start : start + length]
            [output] = llm.generate(TEXTS[0], greedy(40, stop=["never in it \x00", stop]))
            answer = output.outputs[0]
            assert answer.text == full.text[: full.text.index(stop)]
            assert answer.finish_reason == "stop" and answer.stop_reason == stop
            assert full.token_ids[: len(answer.token_ids)] == answer.token_ids
            chunks = list(llm.stream(TEXTS[0], greedy(40, stop=stop)))
            assert "".join(chunk.text for chunk in chunks) == answer.text
            assert chunks[-1].finish_reason == "stop"


def test_the_beginning_of_a_stop_string_is_not_lost(llm: LLM) -> None:
    """What looked like the beginning of a stop string comes out at the end, when nothing came of it."""
    full = llm.generate(TEXTS[0], greedy(10))[0].outputs[0].text
    stop = full[-2:] + " and what does not come"
    [output] = llm.generate(TEXTS[0], greedy(10, stop=stop))
    assert output.outputs[0].text == full and output.outputs[0].finish_reason == "length"
    assert "".join(map(str, llm.stream(TEXTS[0], greedy(10, stop=stop)))) == full


def test_a_stop_string_that_names_a_special_token_ends_the_answer_at_it(llm: LLM) -> None:
    """The text leaves special tokens out, and the stop string is found all the same; alone or within more text."""
    for stop, pattern in (("<|user|>", "<[260]>"), ("a<|user|>", '"a" <[260]>'), ("<|user|>ab", '<[260]> "ab"')):
        grammar = StructuredOutputs(grammar=f'start: "th" {pattern} "th" "th"')
        for include in (False, True):
            params = greedy(20, stop=stop, structured_outputs=grammar, include_stop_str_in_output=include)
            answer = llm.generate("x", params)[0].outputs[0]
            assert (answer.text, answer.finish_reason) == ("th" + include * stop, "stop") and answer.stop_reason == stop
            assert "".join(map(str, llm.stream("x", params))) == answer.text
        params = greedy(20, stop=stop, structured_outputs=grammar, skip_special_tokens=False)
        assert llm.generate("x", params)[0].outputs[0].text == "th"
    forced = greedy(6, stop="<|user|>", allowed_token_ids=[USER])
    assert llm.generate("x", forced)[0].outputs[0].token_ids == [USER]
    assert (
        len(
            llm.generate("x", greedy(6, stop="<|user|>", min_tokens=3, allowed_token_ids=[USER]))[0]
            .outputs[0]
            .token_ids
        )
        == 3
    )


def test_stop_token_ids(llm: LLM) -> None:
    full = llm.generate(TEXTS[0], greedy(20))[0].outputs[0]
    stop = full.token_ids[7]
    cut = full.token_ids.index(stop) + 1
    answer = llm.generate(TEXTS[0], greedy(20, stop_token_ids=[VOCAB - 2, stop]))[0].outputs[0]
    assert answer.token_ids == full.token_ids[:cut] and answer.finish_reason == "stop" and answer.stop_reason == stop
    assert answer.text == llm.tokenizer.decode(full.token_ids[: cut - 1]), "the stop token is no text"


def test_the_end_token(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    full = llm.generate(TEXTS[0], greedy(20))[0].outputs[0]
    end = full.token_ids[5]
    monkeypatch.setattr(llm.engine, "eos_token_ids", frozenset({EOS, end}))
    answer = llm.generate(TEXTS[0], greedy(20, ignore_eos=False))[0].outputs[0]
    assert answer.token_ids == full.token_ids[: full.token_ids.index(end) + 1]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)  # as vLLM has it: the model ended by itself
    chunks = list(llm.stream(TEXTS[0], greedy(20, ignore_eos=False)))
    assert "".join(map(str, chunks)) == answer.text == llm.tokenizer.decode(answer.token_ids[:-1])
    assert llm.generate(TEXTS[0], greedy(20))[0].outputs[0] == full


def test_the_context_ends_an_answer(llm: LLM) -> None:
    """max_tokens may ask for more than the context holds."""
    assert llm.max_model_len == 128
    ids = checkpoints.token_ids(120)
    [output] = llm.generate([ids], greedy(1000))
    assert len(output.outputs[0].token_ids) == 8 and output.outputs[0].finish_reason == "length"
    assert answers([output]) == answers(llm.generate([ids], greedy(8)))


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_logprobs(llm: LLM, count: int) -> None:
    """The most likely tokens and the chosen one: log_softmax of what the model computes, whatever the temperature."""
    params = SamplingParams(temperature=1.5, max_tokens=9, seed=3, logprobs=count, ignore_eos=True)
    [output] = llm.generate(TEXTS[0], params)
    answer = output.outputs[0]
    logits = llm.logits(output.prompt_token_ids + answer.token_ids)[len(output.prompt_token_ids) - 1 : -1].astype(
        np.float64
    )
    expected = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    assert len(answer.logprobs) == len(answer.token_ids) == 9
    chosen_outside = 0
    for token, row, logprobs in zip(answer.token_ids, expected, answer.logprobs, strict=True):
        best = set(np.argsort(-row)[:count].tolist())
        assert set(logprobs) == best | {token}
        chosen_outside += token not in best
        for other, value in logprobs.items():
            assert type(other) is int and isinstance(value, float)
            assert value == pytest.approx(row[other], abs=1e-6)
    assert chosen_outside or count == 100
    chunks = list(llm.stream(TEXTS[0], params))
    assert [entry for chunk in chunks for entry in chunk.logprobs] == answer.logprobs


def test_seeds(llm: LLM) -> None:
    """The same seed gives the same answer, alone or in company; another seed another one."""

    def sample(seed: int | None) -> SamplingParams:
        return SamplingParams(temperature=1.0, max_tokens=12, seed=seed, ignore_eos=True)

    alone = answers(llm.generate(TEXTS[0], sample(1)))
    assert answers(llm.generate(TEXTS[0], sample(1))) == alone
    assert answers(llm.generate([TEXTS[1], TEXTS[0], TEXTS[0]], [sample(5), sample(1), sample(2)]))[1:2] == alone
    others = answers(llm.generate([TEXTS[0]] * 3, [sample(1), sample(2), sample(3)]))
    assert others[0] == alone[0] and others[1] != others[0] != others[2] != others[1]


def test_the_seed_of_a_model(folder_of: Callable[[str], Path]) -> None:
    """LLM(seed=...) makes requests without a seed repeatable; without any seed they differ."""
    params = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True)

    def answer(seed: int | None) -> list[list[int]]:
        return answers(LLM(folder_of("llama"), dtype="float32", seed=seed).generate(TEXTS[:2], params))

    assert answer(3) == answer(3) != answer(4)
    assert answer(None) != answer(None)


def test_the_last_logits_of_several_chunks(folder_of: Callable[[str], Path]) -> None:
    llm = LLM(folder_of("llama"), dtype="float32", max_num_batched_tokens=8, num_threads=1)
    ids = checkpoints.token_ids(30)
    logits = llm.logits(ids)
    for last in (1, 5, 6, 7, 14, 29, 30):
        np.testing.assert_array_equal(llm.logits(ids, last), logits[-last:])


def test_narrow_sampling_is_greedy(llm: LLM) -> None:
    """top_k of 1, a tiny top_p and a min_p of 1 each leave the most likely token."""
    expected = answers(llm.generate(TEXTS[0], greedy()))
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-4}):
        params = SamplingParams(**{"temperature": 1.0, "max_tokens": 12, "ignore_eos": True, "seed": 0} | narrow)
        assert answers(llm.generate(TEXTS[0], params)) == expected, narrow


def test_logits(llm: LLM) -> None:
    ids = checkpoints.token_ids(30)
    logits = llm.logits(ids)
    assert logits.shape == (30, VOCAB) and logits.dtype == np.float32
    np.testing.assert_array_equal(llm.logits(ids[:7]), logits[:7])
    for last in (1, 7, 30):
        np.testing.assert_array_equal(llm.logits(ids, last), logits[-last:])
    np.testing.assert_array_equal(llm.logits("the"), llm.logits(llm.tokenizer.encode("the")))
    for count in (0, 129):
        with refused("prompt", f"1 to 128 tokens, not {count}"):
            llm.logits([1] * count)


# --- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_chunks_join_to_the_answer(llm: LLM, text: str) -> None:
    [output] = llm.generate(text, greedy(30))
    chunks = list(llm.stream(text, greedy(30)))
    assert "".join(chunk.text for chunk in chunks) == "".join(map(str, chunks)) == output.outputs[0].text
    assert [token for chunk in chunks for token in chunk.token_ids] == output.outputs[0].token_ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) == 30, "one chunk a token"
    assert chunks[-1].metrics.output_tokens == 30 and chunks[0].logprobs is None


def test_an_abandoned_stream_frees_its_blocks(llm: LLM) -> None:
    free = llm.engine.scheduler.blocks.num_free
    with hold(llm, after=1) as held:
        for _ in llm.stream(TEXTS[0], greedy(50)):
            assert held.started.wait(60)
            assert llm.engine.scheduler.blocks.num_free < free
            break
        gc.collect()
    settle(llm)
    assert llm.engine.scheduler.blocks.num_free == free and not llm.engine.has_work()
    with hold(llm, after=1):
        stream = llm.stream(TEXTS[0], greedy(50))
        next(stream)
        stream.close()
    settle(llm)
    assert llm.engine.scheduler.blocks.num_free == free
    assert llm.logits([1, 2]).shape == (2, VOCAB)


def test_a_stream_that_nobody_reads(llm: LLM) -> None:
    """Its request is cancelled with it, and does not wait in the engine for ever."""
    stream = llm.stream(TEXTS[0], greedy(50))
    del stream
    gc.collect()
    settle(llm)
    assert not llm.engine.has_work()


def test_a_stream_refuses_at_once(llm: LLM) -> None:
    with refused("prompt"):
        llm.stream("")


def test_interleaved_streams(llm: LLM) -> None:
    """Two streams read by turns, a third begun meanwhile, and a generate in between: each as if it were alone."""
    expected = [llm.generate(text, greedy(20))[0].outputs[0].text for text in TEXTS[:4]]
    first, second = llm.stream(TEXTS[0], greedy(20)), llm.stream(TEXTS[1], greedy(20))
    texts = ["", "", ""]
    for _ in range(5):
        texts[0] += next(first).text
        texts[1] += next(second).text
    third = llm.stream(TEXTS[2], greedy(20))
    texts[2] += next(third).text
    assert llm.generate(TEXTS[3], greedy(20))[0].outputs[0].text == expected[3]
    for i, stream in ((1, second), (2, third), (0, first)):
        texts[i] += "".join(map(str, stream))
    assert texts == expected[:3]


def test_logits_beside_a_stream(llm: LLM) -> None:
    """They take what is free of the cache, then what the stream has, which is none the worse for it."""
    expected, logits = llm.generate(TEXTS[0], greedy(40))[0].outputs[0].text, llm.logits([1, 2, 3])
    stream = llm.stream(TEXTS[0], greedy(40))  # of four blocks: with three that are free not eight, when it has ended
    text = next(stream).text
    np.testing.assert_array_equal(llm.logits([1, 2, 3]), logits)
    held = llm.thread.call(lambda: llm.engine.scheduler.blocks.allocate(llm.engine.scheduler.blocks.num_free - 3))
    with refused("prompt", "of 128 tokens needs 8 blocks of the cache, and "):
        llm.logits([1] * 128)
    llm.thread.call(lambda: llm.engine.scheduler.blocks.free(held))
    assert text + "".join(map(str, stream)) == expected


def test_a_model_that_is_dropped_is_freed(folder_of: Callable[[str], Path]) -> None:
    """Its thread ends with it, and a stream keeps it as long as it is read."""
    llm = LLM(folder_of("llama"), dtype="float32")
    kept, thread = weakref.ref(llm.engine.runner.cache), llm.thread
    stream = llm.stream([1, 2], greedy(5))
    next(stream)
    del llm
    gc.collect()
    assert len(list(stream)) == 4
    del stream
    gc.collect()
    assert thread._thread is not None and not thread._thread.is_alive()
    del thread
    gc.collect()
    assert kept() is None


def test_streams_of_several_threads(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that take turns every microsecond would find a chunk that is read outside the lock."""
    expected = [llm.generate(text, greedy(8))[0].outputs[0].text for text in TEXTS]
    got: list[tuple[int, str, int]] = []

    def read(i: int) -> None:
        for _ in range(20):
            chunks = list(llm.stream(TEXTS[i], greedy(8)))
            got.append((i, "".join(map(str, chunks)), sum(chunk.finish_reason is not None for chunk in chunks)))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(TEXTS))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert len(got) == 20 * len(TEXTS)
    assert set(got) == {(i, text, 1) for i, text in enumerate(expected)}


def test_each_model_has_its_threads(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever was made last, and whichever thread asks."""
    models = [LLM(folder_of("llama"), dtype="float32", num_threads=threads) for threads in (1, 2)]
    run = ThreadPool.run
    for threads, llm in enumerate(models, start=1):
        seen: list[int] = []

        def spy(pool: Any, table: int, count: int, threads: int, times: int = 0, seen: list[int] = seen) -> None:
            seen.append(threads)
            run(pool, table, count, threads, times)

        monkeypatch.setattr(ThreadPool, "run", spy)
        for call in (lambda llm=llm: llm.logits([1]), lambda llm=llm: llm.generate([[1]], greedy(1))):
            call()
            worker = threading.Thread(target=call)
            worker.start()
            worker.join()
        monkeypatch.setattr(ThreadPool, "run", run)
        assert llm.num_threads == threads
        assert set(seen) == {threads} and len(seen) >= 4


def test_there_are_no_more_threads_than_cores(folder_of: Callable[[str], Path]) -> None:
    """More would only wait for each other."""
    llm = LLM(folder_of("llama"), dtype="float32", num_threads=1000)
    assert llm.num_threads == _jit.cores()
    assert llm.generate([[1, 2]], greedy(3))[0].outputs[0].token_ids


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", [], [[]], ["fine", ""], [[1], []]])
def test_an_empty_prompt(llm: LLM, prompt: Any) -> None:
    """Refused, and the good prompts beside it leave nothing behind; no prompts at all is no error."""
    if prompt == []:
        assert llm.generate(prompt, greedy()) == []
    else:
        with refused("prompt", "empty"):
            llm.generate(prompt, greedy())


@pytest.mark.parametrize("length", [128, 129, 1000])
def test_a_prompt_longer_than_the_context(llm: LLM, length: int) -> None:
    for prompt in ([[5] * length], "x" * length, ["fine", "x" * length]):
        with refused("prompt", f"The prompt has {length} tokens and the context (max_model_len) holds 128"):
            llm.generate(prompt, greedy())
    assert len(llm.generate("x" * 127, greedy())[0].outputs[0].token_ids) == 1


@pytest.mark.parametrize("token", [-1, VOCAB, 10**12])
def test_a_token_outside_the_vocabulary(llm: LLM, token: int) -> None:
    for call in (llm.generate, llm.stream, llm.logits):
        with refused("prompt", f"Token id {token} is outside"):
            call([1, token])


@pytest.mark.parametrize("prompt", [3, [1, "a"], [["a", "b"]], [1.5], [[1, None]], None, [None], [{"role": "user"}]])
def test_a_prompt_of_another_kind(llm: LLM, prompt: Any) -> None:
    with refused("prompt", "text or a list of token ids"):
        llm.generate(prompt, greedy())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", -0.5),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("logprobs", -1),
        ("logprobs", 101),
        ("stop", [""]),
        ("stop", ""),
    ],
)
def test_a_parameter_outside_its_range(name: str, value: Any) -> None:
    """The message has the name, the value and the range; and it is a ValueError, as elsewhere in Python."""
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert isinstance(caught.value, ValueError)
    assert repr(value) in str(caught.value) or name == "stop"


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("max_model_length", "max_model_len"), ("num_thread", "num_threads"), ("data_type", None), ("dtyp", "dtype")],
)
def test_an_unknown_option(option: str, nearest: str | None, folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=option) as caught:
        LLM(folder_of("llama"), **{option: 1})
    assert "kv_cache_memory" in str(caught.value), "all options are listed"
    assert nearest is None or f"Did you mean {nearest!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int3"}, ["int3", "float32", "int8"]),
        ({"dtype": "float16"}, ["float16", "bfloat16"]),
        ({"max_model_len": 129}, ["129", "128"]),
        ({"max_model_len": 0}, ["max_model_len", "0"]),
        ({"max_num_seqs": 0}, ["max_num_seqs", "0"]),
        ({"max_num_batched_tokens": 0}, ["max_num_batched_tokens", "0"]),
        ({"block_size": 17}, ["block_size", "17", "16"]),
        ({"block_size": 0}, ["block_size", "0"]),
        ({"num_threads": 0}, ["num_threads", "0"]),
        ({"kv_cache_memory": 0}, ["kv_cache_memory", "0"]),
        (
            {"kv_cache_memory": 1000},
            ["kv_cache_memory", "max_model_len", "1000 bytes", "2 tokens", "blocks of 16"],
        ),
        ({"seed": -1}, ["seed", "-1"]),
        ({"seed": "x"}, ["seed", "'x'"]),
        ({"max_model_len": 1}, ["max_model_len", "1", "2"]),
        ({"max_num_seqs": 2.5}, ["max_num_seqs", "2.5"]),
        ({"dtype": None}, ["None", "float32"]),
        ({"max_model_len": 100, "kv_cache_memory": 100_000}, ["kv_cache_memory", "100"]),
        ({"load_format": "pickle"}, ["pickle", "auto", "dummy"]),
        ({"chat_template": 5}, ["chat_template", "5", "Jinja"]),
        ({"chat_template": ""}, ["chat_template", "''", "Jinja"]),
        ({"chat_template": "/nowhere/x.jinja"}, ["/nowhere/x.jinja", "cannot be read", "No such file"]),
        ({"chat_template": "a\0b"}, ["cannot be read"]),
        ({"chat_template": "\n"}, ["the option chat_template is empty"]),
        ({"chat_template": "{% audio %}"}, ["the option chat_template is no valid Jinja at line 1", "audio"]),
        ({"enable_prefix_caching": "yes"}, ["enable_prefix_caching", "yes", "True or False"]),
    ],
)
def test_an_option_outside_its_range(
    options: dict[str, Any], words: list[str], folder_of: Callable[[str], Path]
) -> None:
    with pytest.raises(UserError) as caught:
        LLM(folder_of("llama"), **options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("as_gguf", [False, True])
def test_a_chat_template_of_ones_own(folder_of: Callable[[str], Path], tmp_path: Path, as_gguf: bool) -> None:
    """In place of the checkpoint's, and of the one it has for tools; its end tokens are those of the answer."""
    model = folder_of("llama")
    if as_gguf:
        model = checkpoints.write_model_gguf(tmp_path / "model.gguf", checkpoints.CONFIGS["llama"])
    source = "{{ messages[0].content }} {{ tools[0].function.name if tools }}:"
    file = tmp_path / "own.jinja"
    file.write_bytes(b"\xef\xbb\xbf" + source.encode())
    question, tools = [{"role": "user", "content": "a"}], [{"type": "function", "function": {"name": "f"}}]
    for given in (source, file, str(file)):
        llm = LLM(model, num_threads=1, max_model_len=64, chat_template=given)
        assert llm.chat_text(question) == "a :" and llm.chat_text(question, tools=tools) == "a f:"
        assert llm.chat_template is not None and llm.chat_template.source == source
        with refused(None, f"The chat template of {'the option chat_template' if given == source else file} fails"):
            llm.chat_text(question, tools=[{"type": "function"}])
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match=rf"{file} is not UTF-8 text \(at byte 0\)"):
        LLM(model, chat_template=file)


def test_a_small_cache_shortens_the_context(folder_of: Callable[[str], Path]) -> None:
    """Where max_model_len is not asked for, it is what memory holds."""
    block = 3 * 5 * (24 + 32) * 4 * 16
    llm = LLM(folder_of("llama"), dtype="float32", kv_cache_memory=3 * block)
    assert llm.max_model_len == 48
    [output] = llm.generate([[5] * 40], greedy(100))
    assert len(output.outputs[0].token_ids) == 8
    with refused("prompt"):
        llm.generate([[5] * 48], greedy())


def test_a_cache_for_fewer_than_run_at_once(folder_of: Callable[[str], Path], llm_of: Callable[..., LLM]) -> None:
    """Requests wait for blocks, and all are answered as if there were plenty."""
    block = 3 * 5 * (24 + 32) * 4 * 16
    narrow = LLM(folder_of("llama"), dtype="float32", kv_cache_memory=4 * block, max_model_len=64)
    prompts = [checkpoints.token_ids(4 * i + 1, seed=i) for i in range(8)]
    assert answers(narrow.generate(prompts, greedy(20))) == answers(llm_of("llama").generate(prompts, greedy(20)))
    assert narrow.engine.scheduler.blocks.num_free == 4


def test_dummy_weights_speak_token_ids(folder_of: Callable[[str], Path]) -> None:
    llm = LLM(folder_of("llama"), load_format="dummy", dtype="float32")
    [output] = llm.generate([[1, 2, 3]], greedy(4))
    assert len(output.outputs[0].token_ids) == 4 and output.outputs[0].text == ""
    for call in (llm.generate, llm.stream, llm.logits):
        with refused("prompt", "give token ids instead of text"):
            call("text")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_not_numbers(tmp_path: Path, dtype: str, name: str) -> None:
    """Refused at load, by the tensor's name: integers have no nan, and would answer noise with a straight face."""
    tensors = checkpoints.tensors_of(checkpoints.CONFIGS["llama"])
    tensors[name].ravel()[7] = np.nan
    folder = checkpoints.write_folder(tmp_path, checkpoints.CONFIGS["llama"], tensors)
    with pytest.raises(CheckpointError, match="holds nan") as caught:
        LLM(folder, dtype=dtype)
    assert name in str(caught.value) and "model.safetensors" in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_one_damaged_request_harms_no_other(llm_of: Callable[..., LLM], dtype: str) -> None:
    llm = llm_of("llama", dtype)
    alone = [llm.generate([ids], greedy(5))[0].outputs[0].token_ids for ids in ([1, 2, 3], [9, 8])]
    with damaged_by(77, llm):
        streams = [llm.stream(ids, greedy(5)) for ids in ([1, 2, 3], [77, 5], [9, 8])]
        first = [next(streams[0]).token_ids]
        with pytest.raises(TinyserveError, match="not numbers"):
            list(streams[1])
        tokens = [first + [chunk.token_ids for chunk in streams[0]], [chunk.token_ids for chunk in streams[2]]]
        assert [[*chain(*chunks)] for chunks in tokens] == alone
        with pytest.raises(TinyserveError, match="not numbers"):
            llm.generate([[1, 2], [77]], greedy(2))
    settle(llm)
    assert not llm.engine.has_work() and llm.engine.scheduler.blocks.num_free == llm.engine.scheduler.blocks.num_blocks


def test_a_stream_that_is_closed_in_the_middle_of_a_step(llm_of: Callable[..., LLM]) -> None:
    """The garbage collector may do this at any moment, in the thread that holds the lock."""
    llm = llm_of("llama")
    expected = llm.generate([[1, 2, 3]], greedy(6))[0].outputs[0].token_ids
    with hold(llm, after=1) as held:
        doomed = llm.stream([4, 5], greedy(50))
        next(doomed)
        assert held.started.wait(60)
        execute, closed = llm.engine.runner.execute, []

        def closing(scheduled: Any) -> Any:
            closed.append(not doomed._request.finished)
            doomed.close()
            return execute(scheduled)

        llm.engine.runner.execute = closing  # type: ignore[method-assign]
        kept = llm.stream([1, 2, 3], greedy(6))
        held.release.set()
        assert [*chain(*(chunk.token_ids for chunk in kept))] == expected and closed[0]
    settle(llm)
    assert llm.engine.scheduler.blocks.num_free == llm.engine.scheduler.blocks.num_blocks


def test_a_tokenizer_that_knows_more_than_the_model(
    llm_of: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such an id would read past the embedding: text is checked as ids are."""
    llm = llm_of("llama")
    monkeypatch.setattr(llm.tokenizer, "encode", lambda text: [1, llm.config.vocab_size])
    with refused("prompt", f"Token id {llm.config.vocab_size} is outside"):
        llm.generate("text")


def test_a_stop_string_that_comes_of_the_last_bytes(llm_of: Callable[..., LLM]) -> None:
    """Bytes that never became a character are one when the answer ends, and may complete a stop string."""
    llm = llm_of("llama")
    sequence = Sequence(0, [1], SamplingParams(stop="\ufffd"))
    request = RequestState(sequence, None, llm.tokenizer.detokenizer())
    token = next(t for t in range(256) if llm.tokenizer.token_bytes(t) == b"\xe2")
    assert not request.take(Update(sequence, 1, token)) and not request.finished
    assert not request.take(Update(sequence, 2, token, finish_reason="length"))
    assert (request.text, request.finish_reason, request.stop_reason) == ("", "stop", "\ufffd")


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 3.0}, {"max_tokens": True}, {"top_k": 5.0}, {"seed": 1.0}, {"seed": -1}, {"logprobs": 2.0},
        {"stop_token_ids": ["a"]}, {"stop_token_ids": "abc"}, {"stop": 5}, {"stop": [""]}, {"ignore_eos": "no"},
        {"temperature": "hot"}, {"temperature": float("nan")},
    ],
)  # fmt: skip
def test_a_parameter_of_another_kind_is_refused_at_once(options: dict[str, Any]) -> None:
    with refused(next(iter(options))):
        SamplingParams(**options)


def test_a_parameter_that_does_not_exist_names_the_nearest() -> None:
    with refused("temprature", "Did you mean 'temperature'"):
        SamplingParams(temprature=1)  # type: ignore[call-arg]
    assert replace(SamplingParams(seed=3), seed=4).seed == copy.copy(SamplingParams(seed=4)).seed == 4


def test_prompts_as_vllm_writes_them(llm_of: Callable[..., LLM]) -> None:
    llm = llm_of("llama")
    ids, text = [5, 6, 7], "ab"
    for prompt, same in (({"prompt_token_ids": ids}, ids), ({"prompt": text}, text)):
        outputs = [llm.generate(p, greedy(3))[0] for p in (prompt, same)]
        assert outputs[0].prompt_token_ids == outputs[1].prompt_token_ids
        assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
        assert outputs[0].prompt == outputs[1].prompt
    with refused("add_special_tokens", "add_special_tokens is 'no'; it must be True or False"):
        llm.generate({"prompt": text, "add_special_tokens": "no"})
    for wrong in ({"a", "b"}, {"text": "a"}, b"ab"):
        with refused("prompt", "A prompt is"):
            llm.generate(wrong)  # type: ignore[arg-type]
    for params in ({"temperature": 0}, ["x"], "greedy"):
        with refused("sampling_params"):
            llm.generate("a", params)  # type: ignore[arg-type]
    with refused("max_tokens", "SamplingParams(max_tokens="):
        llm.chat([{"role": "user", "content": "a"}], max_tokens=3)


def test_memory_is_asked_for_before_it_is_taken(folder_of: Callable[[str], Path]) -> None:
    asked: list[int] = []
    llm = LLM(folder_of("granite-hybrid"), dtype="float32", max_num_seqs=2, reserve=asked.append)
    padding = llm.model.nbytes - weight_bytes(llm.config, "float32")  # of odd sizes, to whole panels
    assert 0 < padding < 0.1 * llm.model.nbytes
    assert asked == [llm.model.nbytes + llm.cache_plan.nbytes - padding]

    def refuse(nbytes: int) -> None:
        raise UserError(f"{nbytes} bytes are too many.")

    with pytest.raises(UserError, match=f"{asked[0]} bytes are too many"):
        LLM(folder_of("granite-hybrid"), dtype="float32", max_num_seqs=2, reserve=refuse)


def test_a_long_prompt_is_reported_step_by_step(folder_of: Callable[[str], Path]) -> None:
    heard: list[tuple[str, int, int]] = []
    llm = LLM(folder_of("llama"), dtype="float32", max_num_batched_tokens=8, progress=lambda *told: heard.append(told))
    llm.generate([[1] * 20], greedy(2))
    assert [told for told in heard if told[0] == "prefill"] == [("prefill", 8, 20), ("prefill", 16, 20)]
    loads = [told for told in heard if told[0] == "load"]
    assert loads[-1][1] == loads[-1][2] > 0


FORK = """
import os, signal, sys
from tinyserve import LLM, SamplingParams

llm = LLM(sys.argv[1], dtype="float32", num_threads=2)
greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
answer = lambda: llm.generate([[1, 2, 3]], greedy)[0].outputs[0].token_ids
expected, running = answer(), llm.stream([4, 5], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
next(running)
for _ in range(3):
    child = os.fork()
    if not child:
        signal.alarm(60)  # a hang ends it
        os._exit(0 if answer() == expected else 1)
    print(os.waitpid(child, 0)[1], answer() == expected)
print(sum(len(chunk.token_ids) for chunk in running))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no forks")
def test_a_child_of_a_fork_has_threads_of_its_own(folder_of: Callable[[str], Path]) -> None:
    """Also of one that comes while the engine works; the parent goes on."""
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(folder_of("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split("\n")[:4] == ["0 True"] * 3 + ["59"], done.stderr


def test_the_fingerprint_is_of_the_bits(llm_of: Callable[..., LLM]) -> None:
    one, other = llm_of("llama", "float32"), llm_of("llama", "int8")
    before = one.stats().prompt_tokens
    assert one.fingerprint() == one.fingerprint() != other.fingerprint()
    assert one.stats().prompt_tokens == before
