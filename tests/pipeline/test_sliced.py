"""A model in slices is the whole model, to the bit: tokens and log-probabilities, whatever is asked of it.

All slices are in this process here; test_on_ray.py has them in others.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from conftest import answers, cache_bytes
from drafts import NGRAM, Spoiled, assert_all_is_free

from tinyserve import LLM, BeamSearchParams, RequestOutput, SamplingParams, StructuredOutputs
from tinyserve.checkpoints.checkpoint import Checkpoint, LazyTensor
from tinyserve.engine import Update
from tinyserve.errors import CacheLostError, CheckpointError, EngineDeadError, UserError
from tinyserve.models import build_model
from tinyserve.models.config import parse_config
from tinyserve.pipeline import micro_batches
from tinyserve.pipeline.sliced import LocalSlices, SlicedForwardPass
from tinyserve.quantize import write
from tinyserve.text.request import RequestState

Folder = Callable[[str], Path]
FAMILIES = ("gpt2-by-layer", "falcon-40b", "falcon-rw", "llama-3", "qwen3", "granite-moe", "granite-hybrid-moe")
KINDS = ("llama-grouped", "granite-hybrid")  # with and without states; both with a tied head
COUNT = 9


def build(folder: Path, slices: int = 1, **options: Any) -> LLM:
    defaults = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 6, "max_num_batched_tokens": 40}
    cut = {"pipeline_parallel_size": slices, "distributed_executor_backend": "uni"} if slices > 1 else {}
    return LLM(folder, **defaults | cut | options)


def local(llm: LLM) -> LocalSlices:
    assert isinstance(llm.slices, LocalSlices)
    return llm.slices


def forward_of(llm: LLM) -> SlicedForwardPass:
    runner: Any = llm.engine.runner
    forward = runner.forward
    assert isinstance(forward, SlicedForwardPass)
    return forward


class Deaf:
    """Takes the updates of a request that nobody waits for."""

    def put(self, updates: list[Update]) -> None: ...


def requests(max_tokens: int = 12) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of unequal lengths, some with a common beginning; greedy ones, and others that draw by a seed."""
    common = checkpoints.token_ids(35, seed=1)
    prompts, params = [], []
    for i in range(COUNT):
        prompts.append(common[: 35 - 3 * i if i % 3 == 0 else 0] + checkpoints.token_ids(1 + 5 * i % 13, seed=i + 2))
        one = SamplingParams(temperature=0.0, max_tokens=max_tokens - i % 4, ignore_eos=True, logprobs=5)
        kinds: tuple[dict[str, Any], ...] = ({}, {"temperature": 0.9, "top_p": 0.95}, {"temperature": 1.5, "n": 2})
        params.append(replace(one, seed=i, **kinds[i % 3]))
    return prompts, params


def cached(outputs: list[RequestOutput]) -> list[int]:
    return [output.metrics.cached_tokens for output in outputs]


def preemptions(outputs: list[RequestOutput]) -> int:
    return sum(output.metrics.preemptions for output in outputs)


# --- each family, each dtype ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "w8a8", "w4a16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_two_slices_are_the_whole(name: str, dtype: str, folder_of: Folder) -> None:
    whole, sliced = (build(folder_of(name), count, dtype=dtype) for count in (1, 2))
    assert len(local(sliced).slices) == 1 and sliced.model.layers.stop == 3 > len(sliced.model.layers)
    prompts, params = requests()
    params[1] = replace(params[1], prompt_logprobs=3)
    first, second = (llm.generate(prompts, params) for llm in (whole, sliced))
    assert answers(second) == answers(first)
    assert second[1].prompt_logprobs == first[1].prompt_logprobs and first[1].prompt_logprobs is not None
    turns = [output.prompt_token_ids + output.outputs[0].token_ids + [1, 2] for output in first]
    again, and_again = (llm.generate(turns, params) for llm in (whole, sliced))
    assert answers(and_again) == answers(again)
    assert cached(and_again) == cached(again) and max(cached(again)) >= 16
    text = checkpoints.token_ids(70, seed=3)
    assert np.array_equal(sliced.logits(text, last=45), whole.logits(text, last=45))
    assert np.array_equal(sliced.embed([text])[0].embedding, whole.embed([text])[0].embedding)
    assert_all_is_free(sliced)


@pytest.mark.parametrize("name", ["gpt2", "falcon-untied", "granite-hybrid", "granite-hybrid-moe"])
def test_three_slices_are_the_whole(name: str, folder_of: Folder) -> None:
    """A layer each; in the hybrids slices without states, or without keys and values."""
    whole, sliced = (build(folder_of(name), count, dtype="int8") for count in (1, 3))
    assert sliced.slices is not None and sliced.slices.layers == [range(1), range(1, 2), range(2, 3)]
    prompts, params = requests()
    for _ in range(2):
        assert answers(sliced.generate(prompts, params)) == answers(whole.generate(prompts, params))


def test_slices_of_a_gguf_file_and_of_synthetic_weights(tmp_path: Path) -> None:
    file = checkpoints.write_model_gguf(tmp_path / "model.gguf", checkpoints.CONFIGS["llama-grouped"])
    prompts, params = requests()
    whole, sliced = (build(file, count, dtype="int8") for count in (1, 2))
    assert answers(sliced.generate(prompts, params)) == answers(whole.generate(prompts, params))
    whole, sliced = (build(file, count, dtype="int8", load_format="dummy") for count in (1, 2))
    assert answers(sliced.generate(prompts, params)) == answers(whole.generate(prompts, params))


@pytest.mark.parametrize("name", ["llama-grouped", "granite-moe"])
def test_slices_of_a_packed_folder(name: str, folder_of: Folder, tmp_path: Path) -> None:
    write(str(folder_of(name)), tmp_path / "packed", "w4a16")
    prompts, params = requests()
    whole, sliced = (build(tmp_path / "packed", count, dtype="auto") for count in (1, 2))
    assert answers(sliced.generate(prompts, params)) == answers(whole.generate(prompts, params))


@pytest.mark.parametrize("name", ["llama-3", "granite-hybrid-moe", "falcon-rw"])
def test_steps_are_cut_into_micro_batches(name: str, folder_of: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven tokens and more, in the middle of prompts and of blocks, beside sequences that decode."""
    monkeypatch.setattr(micro_batches, "LEAST", 7)
    whole, sliced = (build(folder_of(name), count, dtype="int8", max_num_batched_tokens=75) for count in (1, 3))
    sent = list[Any]()
    send = local(sliced).send
    monkeypatch.setattr(local(sliced), "send", lambda message: (sent.append(message), send(message))[1])
    prompts, params = requests()
    prompts = [prompt + checkpoints.token_ids(40, seed=i) for i, prompt in enumerate(prompts)]
    params[1] = replace(params[1], prompt_logprobs=3)
    for _ in range(2):
        first, second = (llm.generate(prompts, params) for llm in (whole, sliced))
        assert answers(second) == answers(first)
    assert len(sent) > sliced.stats().steps + 12
    assert_all_is_free(sliced)


@pytest.mark.parametrize("name", ["llama-3", "granite-hybrid", "falcon-rw"])
def test_a_part_of_a_prompt_may_stay_with_the_slices(
    name: str, folder_of: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its sequence ends and gives its blocks away, is answered several times, or goes on from what was cached."""
    monkeypatch.setattr(micro_batches, "LEAST", 5)
    whole, sliced = (build(folder_of(name), count, dtype="int8", max_num_batched_tokens=20) for count in (1, 2))
    forward = forward_of(sliced)
    left, doomed, begin = list[int](), list[RequestState](), forward.begin

    def begin_and_end(*step: Any) -> Any:
        """In mid-prompt the sequence is ended, whose last tokens a slice still has."""
        begun = begin(*step)
        left.append(len(forward._under_way))
        if doomed and left[-1]:
            sliced.cancel(doomed.pop())
        return begun

    monkeypatch.setattr(forward, "begin", begin_and_end)
    text = checkpoints.token_ids(90, seed=1)
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=1, n=3, logprobs=2)
    for i, prompt in enumerate((text, [*text[:64], *checkpoints.token_ids(20, seed=2)], text)):
        doomed += sliced.make_request(checkpoints.token_ids(80, seed=i + 3), SamplingParams(max_tokens=1))
        sliced.thread.submit([doomed[0].sequence], Deaf())
        first, second = (llm.generate([prompt], params) for llm in (whole, sliced))
        assert answers(second) == answers(first) and not doomed
        assert cached(second) == cached(first)
    assert max(left) == 1 and left[-1] == 0
    assert_all_is_free(sliced)


# --- what can be asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_preemption(name: str, folder_of: Folder) -> None:
    whole = build(folder_of(name))
    memory = cache_bytes(whole, 8, 6)
    prompts, params = requests(max_tokens=30)
    small = [build(folder_of(name), count, kv_cache_memory=memory, max_model_len=110) for count in (1, 2)]
    assert small[0].cache_plan == small[1].cache_plan and small[0].cache_plan.num_blocks <= 9
    crowded = [llm.generate(prompts, params) for llm in small]
    assert answers(crowded[0]) == answers(crowded[1]) == answers(whole.generate(prompts, params))
    assert preemptions(crowded[1]) == preemptions(crowded[0]) > 0


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("draft", ["ngram", "llama", "granite-hybrid-moe"])
def test_speculation(name: str, draft: str, folder_of: Folder) -> None:
    """With rejections, after which states go back to a copy that each slice has made of its own."""
    config = NGRAM if draft == "ngram" else {"method": "draft_model", "model": str(folder_of(draft))}
    sliced = build(folder_of(name), 2, speculative_config=config)
    spoiled = Spoiled(sliced, every=3)
    prompts, params = requests(max_tokens=25)
    assert answers(sliced.generate(prompts, params)) == answers(build(folder_of(name)).generate(prompts, params))
    assert sum(spoiled.places.values()) > 5
    assert_all_is_free(sliced)


@pytest.mark.parametrize("name", KINDS)
def test_grammars_and_beams(name: str, folder_of: Folder) -> None:
    whole, sliced = (build(folder_of(name), count) for count in (1, 2))
    structure = StructuredOutputs(regex="[a-f]{3}(-[0-9]{2}){3}")
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=20, structured_outputs=structure, logprobs=2)
    first, second = (llm.generate(["one", "another"], params) for llm in (whole, sliced))
    assert answers(second) == answers(first) and len(first[0].outputs[0].text) == 12
    beams = BeamSearchParams(beam_width=3, max_tokens=8)
    found = [llm.beam_search([checkpoints.token_ids(20)], beams)[0].sequences for llm in (whole, sliced)]
    assert [(one.tokens, one.cum_logprob) for one in found[1]] == [(one.tokens, one.cum_logprob) for one in found[0]]


# --- what a slice holds -----------------------------------------------------------------------------------------------


def lazily(raw: Any, read: list[str]) -> Checkpoint:
    """A checkpoint that notes what is read of it."""

    def reader(name: str, array: Any) -> Callable[[], Any]:
        return lambda: (read.append(name), array)[1]

    tensors = checkpoints.tensors_of(raw).items()
    return Checkpoint({name: LazyTensor(array.shape, "file", reader(name, array)) for name, array in tensors}, "file")


@pytest.mark.parametrize("name", ["llama", "llama-grouped", "granite-hybrid", "gpt2", "falcon-untied"])
@pytest.mark.parametrize("layers", [range(1), range(1, 2), range(1, 3), range(3)])
def test_a_slice_reads_its_own_tensors_and_checks_all(name: str, layers: range) -> None:
    raw, read = checkpoints.CONFIGS[name], list[str]()
    config, told = parse_config(raw), list[tuple[int, int]]()
    build_model(
        config, lazily(raw, read), "float32", 32, lambda _, done, total: told.append((done, total)), layers=layers
    )
    own = list(config.tensor_shapes(layers))
    assert sorted(read) == sorted(tensor.name for tensor in own)
    assert told[-1] == (sum(tensor.size for tensor in own),) * 2
    for other in config.tensor_shapes():
        broken = lazily(raw, read)
        broken.tensors[other.name] = replace(broken.tensors[other.name], shape=(1, 2, 3, 4))
        with pytest.raises(CheckpointError, match="has shape"):
            build_model(config, broken, "float32", 32, layers=layers)


def test_two_slices_have_half_each(tmp_path: Path) -> None:
    raw = checkpoints.CONFIGS["llama"] | {"num_hidden_layers": 20, "vocab_size": 300}
    folder = checkpoints.write_folder(tmp_path / "deep", raw)
    for dtype in ("float32", "int8", "w4a16"):
        whole, sliced = (build(folder, count, dtype=dtype) for count in (1, 2))
        held = [one._model.nbytes for one in local(sliced).slices if one._model]
        assert sliced.model.nbytes == whole.model.nbytes and sliced.model.kept == whole.model.kept
        held.append(sliced.model.nbytes - sum(held))
        assert max(held) <= 0.55 * whole.model.nbytes
        caches = [one._forward.cache for one in local(sliced).slices if one._forward]
        assert [len(cache.layers) for cache in caches] == [len(layers) for layers in local(sliced).layers[:-1]]


# --- errors -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_a_sentence(folder_of: Folder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pipeline_parallel_size is 4, and the model has 3 layers"):
        build(folder_of("llama"), 4)
    with pytest.raises(UserError, match=r"distributed_executor_backend 'mpi' does not exist; there are ray and uni"):
        build(folder_of("llama"), 2, distributed_executor_backend="mpi")
    with pytest.raises(UserError, match=r"pipeline_parallel_size is 0; it must be a whole number of at least 1"):
        build(folder_of("llama"), pipeline_parallel_size=0)
    sliced = build(folder_of("llama"), 2)
    from tinyserve.evaluation.trace import StepShape, trace

    with pytest.raises(UserError, match="A step is traced in one process"):
        trace(sliced, StepShape())


def test_without_ray_the_way_out_is_told(folder_of: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'tinyserve\[ray\]'"):
        LLM(folder_of("llama"), pipeline_parallel_size=2)


@pytest.mark.parametrize("draft", [None, "gpt2"])
def test_what_is_reserved_is_what_all_take_here(draft: str | None, folder_of: Folder) -> None:
    config = {"method": "draft_model", "model": str(folder_of(draft))} if draft else None
    reserved = list[int]()
    for count in (1, 2):
        build(folder_of("llama"), count, speculative_config=config, kv_cache_memory=10**7, reserve=reserved.append)
    assert len(reserved) == 2 and reserved[0] == reserved[1] > 10**6


def test_a_slice_that_finds_another_model_says_so(folder_of: Folder, tmp_path: Path) -> None:
    part = local(build(folder_of("llama"), 2)).slices[0].part
    other = replace(part.config, max_position_embeddings=64)
    from tinyserve.pipeline.slice import Slice

    plan = build(folder_of("llama")).cache_plan
    with pytest.raises(UserError, match="is not the model that the other slices have"):
        Slice(part._replace(config=other)).load(plan)


# --- a slice is lost --------------------------------------------------------------------------------------------------


class Dying:
    """Makes an LLM's slices die in the steps of these numbers, with all that is in their caches."""

    def __init__(self, llm: LLM, steps: Sequence[int]):
        self.llm, self.steps, self.count, self.recovered = llm, set(steps), 0, 0
        slices = local(llm)
        self._send, self._recover = slices.send, slices.recover
        slices.send, slices.recover = self.send, self.recover  # type: ignore[method-assign]

    def send(self, message: Any) -> Any:
        self.count += 1
        if self.count in self.steps:
            self._send(message)()  # it dies with the answer on its lips
            for one in local(self.llm).slices:
                assert one._forward is not None
                for layer in one._forward.cache.layers:
                    for array in layer:
                        array.view(np.uint8).fill(0x7F)
            raise CacheLostError("A slice has died.")
        return self._send(message)

    def recover(self) -> None:
        self.recovered += 1
        self._recover()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("speculative", [None, NGRAM], ids=["plain", "ngram"])
def test_a_slice_that_dies_costs_time_and_no_bit(name: str, speculative: Any, folder_of: Folder) -> None:
    """In prompts and answers, after others have ended whose prefixes were cached, and twice in a row."""
    whole, sliced = build(folder_of(name)), build(folder_of(name), 2, speculative_config=speculative)
    if speculative:
        Spoiled(sliced, every=3)
    prompts, params = requests(max_tokens=20)
    params[1] = replace(params[1], prompt_logprobs=3)
    structure = StructuredOutputs(regex="[a-f]{3}(-[0-9]{2}){9}")
    params[4] = replace(params[4], n=1, structured_outputs=structure, max_tokens=30, ignore_eos=False)
    dying = Dying(sliced, [1, 3, 4, 9, 17, 30, 31, 55])
    for _ in range(3):
        first, second = (llm.generate(prompts, params) for llm in (whole, sliced))
        assert answers(second) == answers(first)
        assert second[1].prompt_logprobs == first[1].prompt_logprobs
    assert sliced.stats().preemptions >= 8, "each time all that ran"
    assert dying.recovered == 8 and dying.count > 60
    assert_all_is_free(sliced)


def test_texts_that_are_only_read_begin_again(folder_of: Folder) -> None:
    whole, sliced = (build(folder_of("granite-hybrid"), count, max_num_batched_tokens=16) for count in (1, 2))
    text = checkpoints.token_ids(70, seed=3)
    dying = Dying(sliced, [3, 7, 15, 16])
    assert np.array_equal(sliced.logits(text, last=45), whole.logits(text, last=45))
    assert np.array_equal(sliced.embed([text])[0].embedding, whole.embed([text])[0].embedding)
    assert dying.recovered == 4
    assert_all_is_free(sliced)


def test_what_kills_slices_again_and_again_ends_the_engine(folder_of: Folder) -> None:
    sliced = build(folder_of("llama"), 2)
    Dying(sliced, range(1, 100))
    with pytest.raises(EngineDeadError, match=r"The engine has stopped: A slice has died\. That was 4 times in a row"):
        sliced.generate([[1, 2, 3]])
    with pytest.raises(EngineDeadError):
        sliced.generate([[1, 2, 3]])


@pytest.mark.parametrize("reads", [False, True])
def test_slices_that_do_not_come_back_end_the_engine(reads: bool, folder_of: Folder) -> None:
    sliced = build(folder_of("llama"), 2)
    Dying(sliced, [2])

    def recover() -> None:
        raise EngineDeadError("A slice has not come back in 600 s.")

    local(sliced).recover = recover  # type: ignore[method-assign]
    with pytest.raises(EngineDeadError, match=r"^The engine has stopped: A slice has not come back in 600 s\.$"):
        if reads:
            sliced.logits(checkpoints.token_ids(60))
        else:
            sliced.generate([[1, 2, 3]], SamplingParams(max_tokens=9, ignore_eos=True))
    with pytest.raises(EngineDeadError):
        sliced.embed([[1, 2, 3]])


class Failing:
    """Makes the last slice fail once, where a part of an earlier step is still to be computed, or is not."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch, owes: bool):
        forward = forward_of(llm)
        step, self.count = forward.step, 0

        def failing(shape: Any) -> Any:
            if not self.count and forward._owes == owes:
                self.count += 1
                raise MemoryError("no room for another program")
            return step(shape)

        monkeypatch.setattr(forward, "step", failing)


@pytest.mark.parametrize("name", KINDS)
def test_a_step_that_fails_with_what_others_have_left_costs_time_and_no_bit(
    name: str, folder_of: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is cached of the prompt is right."""
    monkeypatch.setattr(micro_batches, "LEAST", 5)
    whole, sliced = (build(folder_of(name), count, max_num_batched_tokens=20) for count in (1, 2))
    failing = Failing(sliced, monkeypatch, owes=True)
    prompts, params = [checkpoints.token_ids(90, seed=1)], SamplingParams(max_tokens=6, temperature=1.0, seed=1, n=2)
    for _ in range(2):
        first, second = (llm.generate(prompts, params) for llm in (whole, sliced))
        assert answers(second) == answers(first)
    assert failing.count == 1 and cached(second) == cached(first)
    assert_all_is_free(sliced)


def test_a_step_that_fails_alone_is_its_requests_failure(folder_of: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sliced = (build(folder_of("llama-grouped"), count) for count in (1, 2))
    failing = Failing(sliced, monkeypatch, owes=False)
    prompts, params = requests()
    with pytest.raises(MemoryError, match="no room"):
        sliced.generate(prompts[:1], params[0])
    assert failing.count == 1 and not forward_of(sliced)._under_way
    assert answers(sliced.generate(prompts, params)) == answers(whole.generate(prompts, params))
    assert_all_is_free(sliced)


def test_what_kills_slices_in_mid_prompt_ends_the_engine_too(
    folder_of: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although the step that sends it returns: another one asks for what comes of it."""
    monkeypatch.setattr(micro_batches, "LEAST", 5)
    sliced = build(folder_of("llama-grouped"), 2, max_num_batched_tokens=20)
    send, count = local(sliced).send, 0

    def killing(message: Any) -> Any:
        nonlocal count
        number = count = count + 1
        answer = send(message)

        def wait() -> Any:
            if number % 4 == 0 and number < 100:  # the last of a step, asked for by the next one
                raise CacheLostError("A slice has died.")
            return answer()

        return wait

    monkeypatch.setattr(local(sliced), "send", killing)
    with pytest.raises(EngineDeadError, match="4 times in a row"):
        sliced.generate([checkpoints.token_ids(90, seed=1)])
