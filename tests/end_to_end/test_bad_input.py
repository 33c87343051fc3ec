"""What a request can have wrong, and what a model can: each is a sentence, and everybody else gets the answer due.

The numbers that are not come of real weights: an embedding so large that a multiplier takes it past float32.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from checkpoints import BOS, EOS, USER, VOCAB
from command_line import Shell, run
from conftest import answers
from refusals import refused

from tinyserve import LLM, SamplingParams
from tinyserve.errors import IncompleteError, TinyserveError, UserError

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=20)
WORD = ord("!")  # the token whose embedding is too large
GOOD = [[WORD + 1 if token == WORD else token for token in checkpoints.token_ids(n, seed=n)] for n in (3, 17, 40)]
BAD = [*GOOD[2][:5], WORD, *GOOD[2][5:]]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint that computes no numbers from WORD on: 1e38 is one, and six times as much is not."""
    root = tmp_path_factory.mktemp("overflowing")

    def write(name: str) -> Path:
        raw = checkpoints.CONFIGS[name] | {"tie_word_embeddings": False}
        assert raw["embedding_multiplier"] > 4
        if not (root / name).exists():
            tensors = checkpoints.tensors_of(raw)
            tensors["model.embed_tokens.weight"][WORD] = 1e38
            checkpoints.write_folder(root / name, raw, tensors)
        return root / name

    return write


# --- prompts and parameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [[EOS], [BOS, BOS], [USER], [EOS] * 30, [0], [VOCAB - 1]])
def test_any_token_alone_is_a_prompt(ids: list[int], llm_of: Callable[..., LLM]) -> None:
    for name in ("llama", "granite-hybrid"):
        llm = llm_of(name)
        [output] = llm.generate([ids], GREEDY)
        assert len(output.outputs[0].token_ids) == 6
        assert answers([output]) == answers(llm.generate([np.array(ids, np.uint16)], GREEDY))
        assert llm.logits(ids).shape == (len(ids), VOCAB)


def test_the_default_model_continues_its_special_tokens(smollm2: Path) -> None:
    llm = LLM(smollm2, dtype="int8", max_num_seqs=4, max_model_len=256)
    texts = ["<|im_end|>", "<|im_start|><|im_end|>", "<|endoftext|><|endoftext|>"]
    outputs = llm.generate(texts, GREEDY)
    assert [len(output.prompt_token_ids) for output in outputs] == [1, 2, 2]
    assert all(len(output.outputs[0].token_ids) == 6 for output in outputs)
    ids = [output.prompt_token_ids for output in outputs]
    assert answers(llm.generate(ids, GREEDY)) == answers(outputs)
    [output] = llm.chat([{"role": "user", "content": "<|im_end|>"}], GREEDY)
    assert len(output.outputs[0].token_ids) == 6


@pytest.mark.parametrize(
    "token",
    [-1, VOCAB, 10**30, np.int64(-1), np.int32(VOCAB), np.uint64(2**63 + 1), 1.0, np.float32(1), np.True_, True, "1"],
)
def test_what_is_no_token(token: Any, llm_of: Callable[..., LLM]) -> None:
    llm = llm_of("llama")
    for call in (llm.generate, llm.stream, llm.logits):
        with refused("prompt"):
            call([5, token])
    assert not llm.engine.has_work()


@pytest.mark.parametrize("prompts", [np.array(3), np.array(1.5), object(), {"a"}, (i for i in "ab")])
def test_what_is_no_prompt(prompts: Any, llm_of: Callable[..., LLM]) -> None:
    with refused("prompt", "A prompt is text or a list of token ids"):
        llm_of("llama").generate(prompts, GREEDY)


@pytest.mark.parametrize("params", [5, 0.7, object(), {GREEDY: 1}, (GREEDY for _ in range(1)), [None], "greedy", True])
def test_what_are_no_parameters(params: Any, llm_of: Callable[..., LLM]) -> None:
    llm = llm_of("llama")
    for call in (lambda: llm.generate("a", params), lambda: llm.stream("a", params)):
        with refused("sampling_params", "sampling_params is a SamplingParams or a list of them, not"):
            call()


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, None, 1.0, "4", True, 10**9, 10**30])
def test_a_number_of_sequences_that_is_none(count: Any, folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="max_num_seqs is") as caught:
        LLM(folder_of("llama"), max_num_seqs=count)
    assert repr(count) in str(caught.value) and "at " in str(caught.value)


@pytest.mark.parametrize("name", ["gpt2", "llama-grouped", "granite-hybrid"])
@pytest.mark.parametrize("kept", ["float32", "int8"])
def test_memory_for_less_than_a_block(name: str, kept: str, folder_of: Callable[[str], Path]) -> None:
    """One byte less than a block is refused with both numbers; a block is enough to answer."""

    def build(memory: int | None) -> LLM:
        return LLM(folder_of(name), dtype="float32", kv_cache_dtype=kept, max_num_seqs=1, kv_cache_memory=memory)

    plan = build(None).cache_plan
    least = plan.block_nbytes + 2 * plan.state_nbytes
    said = rf"a cache of 2 tokens, which takes {plan.block_nbytes} bytes in blocks of 16 tokens: raise kv_cache_memory"
    for memory in (1, plan.block_nbytes - 1):
        with pytest.raises(UserError, match=f"^{memory} bytes are too little for {said}"):
            build(2 * plan.state_nbytes + memory)
    for memory in range(1, 2 * plan.state_nbytes, 20_000):
        with pytest.raises(UserError, match=r"too little for the states of 1 seq.* raise kv_cache_memory"):
            build(memory)
    llm = build(least)
    assert (llm.cache_plan.num_blocks, llm.max_model_len) == (1, 16)
    [output] = llm.generate([[1] * 10], SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 6
    with refused("prompt"):
        llm.generate([[1] * 16], GREEDY)


# --- logits that are not numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["granite", "granite-hybrid"])
@pytest.mark.parametrize(("dtype", "kept"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "int8")])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_logits_that_are_not_numbers(name: str, dtype: str, kept: str, overflowing: Callable[[str], Path]) -> None:
    """The request fails with a reason; those beside it and those who get its blocks and its state answer as ever."""

    def build(**options: Any) -> LLM:
        return LLM(overflowing(name), dtype=dtype, kv_cache_dtype=kept, **options)

    plain = build(max_num_seqs=1, enable_prefix_caching=False)
    alone = answers([plain.generate([prompt], GREEDY)[0] for prompt in GOOD])
    assert np.isnan(plain.logits(BAD)[5:]).any(axis=1).all() and np.isfinite(plain.logits(BAD)[:5]).all()
    states = 4 * plain.cache_plan.state_nbytes
    memory = 12 * plain.cache_plan.block_nbytes + states
    llm = build(max_num_seqs=3, max_num_batched_tokens=16, kv_cache_memory=memory, max_model_len=96)
    for params in (GREEDY, SamplingParams(max_tokens=6, n=3, seed=1), SamplingParams(max_tokens=6, min_p=0.1)):
        streams = [llm.stream(prompt, GREEDY) for prompt in GOOD]
        tokens = [next(streams[0]).token_ids, [], []]
        with pytest.raises(TinyserveError, match=r"not numbers: its weights are damaged\.$") as caught:
            llm.generate([BAD], params)
        assert not isinstance(caught.value, ValueError), "it is not the user who is wrong"
        for i, stream in enumerate(streams):
            tokens[i] += [token for chunk in stream for token in chunk.token_ids]
        assert tokens == [ids for ids, _ in alone]
    for i in range(8):  # every block and every state has held what is not a number
        with pytest.raises(TinyserveError, match="not numbers"):
            llm.generate([[WORD, i, *BAD, *BAD[:30]]], GREEDY)
        assert answers(llm.generate(GOOD, GREEDY)) == alone
    assert not llm.engine.has_work() and llm.engine.scheduler.blocks.num_free == llm.engine.scheduler.blocks.num_blocks


def test_who_did_not_fail_has_answers(overflowing: Callable[[str], Path]) -> None:
    """One error for all prompts, which has what there is; where there is nothing, or one prompt, it is the prompt's."""
    llm = LLM(overflowing("granite"), dtype="float32", num_threads=1)
    alone = answers(llm.generate(GOOD, GREEDY))
    with pytest.raises(
        IncompleteError, match=r"^2 of 5 prompts failed, the first of them prompts\[1\]: .* not "
    ) as caught:
        llm.generate([GOOD[0], BAD, GOOD[1], [BAD[-1], *BAD], GOOD[2]], GREEDY)
    outputs = caught.value.outputs
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "error", "length", "error", "length"]
    assert answers([outputs[0], outputs[2], outputs[4]]) == alone and outputs[1].outputs[0].token_ids == []
    assert isinstance(caught.value.__cause__, TinyserveError)
    for prompts in ([BAD], [BAD, BAD]):
        with pytest.raises(TinyserveError, match="not numbers") as only:
            llm.generate(prompts, GREEDY)
        assert not isinstance(only.value, IncompleteError)


# --- on the command line --------------------------------------------------------------------------------------------


def test_a_command_says_in_a_sentence_that_there_are_no_numbers(
    overflowing: Callable[[str], Path], shell: Shell, tmp_path: Path
) -> None:
    folder = overflowing("granite-hybrid")
    options = ("--dtype", "bfloat16", "--max-tokens", "4", "--quiet")
    for more in ((), ("--raw",)):
        assert shell("ask", folder, "hi", *options, *more).code == 0  # and the kernels are compiled
    result = run("ask", folder, "hi!", *options)
    assert "not numbers" in result.sentence and result.code == 1
    chat = shell("chat", folder, "--dtype", "bfloat16", "--max-tokens", "4", stdin="hi!\nhi\n")
    assert chat.code == 0 and "not numbers" in chat.err and chat.out.strip()
    text = tmp_path / "text"
    text.write_text("one two! three")
    for more in ((), ("--json",), ("--against", "none")):
        assert "not numbers in " in shell("eval", folder, "--text", text, "--dtype", "bfloat16", *more).sentence


@pytest.mark.parametrize("prompt", ["<|eos|>", "<|bos|><|bos|>", "<|user|>"])
def test_a_command_answers_special_tokens(prompt: str, folder_of: Callable[[str], Path], shell: Shell) -> None:
    for more in ((), ("--raw",)):
        result = shell("ask", folder_of("llama"), prompt, "--dtype", "float32", "--max-tokens", "4", *more)
        assert result.code == 0 and result.out.endswith("\n") and "first token after" in result.err
