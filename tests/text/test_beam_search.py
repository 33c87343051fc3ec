"""Beam search against transformers' own, against all there is to find, and against greedy decoding."""

import io
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from refusals import refused

from tinyserve import LLM, BeamSearchParams, SamplingParams
from tinyserve.errors import RequestError
from tinyserve.progress import ProgressBar
from tinyserve.text.beam_search import BeamSearchOutput, BeamSearchSequence

FAMILIES = ["gpt2", "llama-grouped", "falcon-7b", "granite-hybrid", "granite-hybrid-moe"]
MANY_ENDS = {"eos_token_id": list(range(3, checkpoints.VOCAB, 7))}  # so that some beams end
PAD = 1  # transformers takes 0 for none
FEW_TOKENS = {"vocab_size": 7, "bos_token_id": 5, "eos_token_id": 6}


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LLM]:
    """A model of this config that ends its answers often."""
    root, loaded = tmp_path_factory.mktemp("ending"), {}

    def load(name: str) -> LLM:
        if name not in loaded:
            folder = checkpoints.save_with_transformers(root / name, checkpoints.CONFIGS[name] | MANY_ENDS)
            loaded[name] = LLM(folder, dtype="float32", max_num_seqs=6)
        return loaded[name]

    return load


def facts(output: BeamSearchOutput) -> list[tuple[Any, ...]]:
    return [(s.tokens, s.logprobs, s.cum_logprob, s.score, s.finish_reason, s.text) for s in output.sequences]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_beams_are_those_of_transformers(name: str, ending: Callable[[str], LLM]) -> None:
    import torch

    llm, oracle = ending(name), checkpoints.transformers_model(checkpoints.CONFIGS[name] | MANY_ENDS)
    oracle.config._experts_implementation = "eager"
    reasons = set()
    for seed, (width, length_penalty) in enumerate([(2, 1.0), (4, 1.0), (4, 0.0), (3, -1.0), (5, 2.5)]):
        prompt = checkpoints.token_ids(9 + seed, seed=seed)
        params = BeamSearchParams(beam_width=width, max_tokens=10, length_penalty=length_penalty)
        [output] = llm.beam_search(prompt, params)
        with torch.no_grad():
            expected = oracle.generate(
                torch.tensor([prompt]), num_beams=width, num_return_sequences=width, do_sample=False,
                max_new_tokens=10, length_penalty=length_penalty, early_stopping="never", pad_token_id=PAD,
                attention_mask=torch.ones(1, len(prompt)),  # or it would hide the padding's token in the prompt
                eos_token_id=sorted(llm.end_tokens), return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        padded = expected.sequences.tolist()
        got = [s.tokens + [PAD] * (len(padded[0]) - len(s.tokens)) for s in output.sequences]
        assert got == padded
        assert [s.score for s in output.sequences] == pytest.approx(
            expected.sequences_scores.tolist(), rel=1e-4, abs=1e-6
        )
        reasons |= {s.finish_reason for s in output.sequences}
    assert reasons == {"stop", "length"}


def next_logprobs(llm: LLM, tokens: list[int]) -> np.ndarray:
    logits = llm.logits(tokens)[-1].astype(np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def full_width(llm: LLM, prompt: list[int], width: int, steps: int, length_penalty: float) -> list[list[int]]:
    """The algorithm's definition: every continuation of every beam, sorted, and no end before the last step."""
    beams, finished = [(0.0, prompt)], []
    for step in range(1, steps + 1):
        grown = [(total + p, [*beam, token])
                 for total, beam in beams for token, p in enumerate(next_logprobs(llm, beam))]  # fmt: skip
        grown.sort(reverse=True)
        ends = [tokens[-1] in llm.end_tokens or step == steps for _, tokens in grown]
        finished += [
            (total / step**length_penalty, tokens)
            for (total, tokens), end in zip(grown[:width], ends[:width], strict=True) if end
        ]  # fmt: skip
        beams = [beam for beam, end in zip(grown, ends, strict=True) if not end][:width]
    return [tokens for _, tokens in sorted(finished, reverse=True)[:width]]


@pytest.mark.parametrize("length_penalty", [-2.0, 0.0, 1.0, 3.0])
def test_no_continuation_is_left_out_and_no_end_comes_too_early(
    length_penalty: float, ending: Callable[[str], LLM]
) -> None:
    for name in ("llama-grouped", "granite-hybrid"):
        llm = ending(name)
        for seed, width in enumerate((2, 3, 6)):
            prompt = checkpoints.token_ids(14, seed=20 + seed)
            params = BeamSearchParams(beam_width=width, max_tokens=7, length_penalty=length_penalty)
            [output] = llm.beam_search([prompt], params)
            expected = full_width(llm, prompt, width, 7, length_penalty)
            assert [s.tokens for s in output.sequences] == expected
            for s in output.sequences:
                chosen = [p[token] for token, p in zip(s.tokens[14:], s.logprobs, strict=True)]
                own = [next_logprobs(llm, s.tokens[:i])[s.tokens[i]] for i in range(14, len(s.tokens))]
                assert chosen == pytest.approx(own, abs=1e-5)
                assert s.cum_logprob == pytest.approx(sum(chosen))
                assert s.score == pytest.approx(s.cum_logprob / len(chosen) ** length_penalty)


def test_the_best_of_all_answers_where_the_search_is_wide_enough(tmp_path: Path) -> None:
    """7 tokens, one of which ends an answer: 36 beams are all there can be before the third token."""
    llm = LLM(
        checkpoints.write_folder(tmp_path / "few", checkpoints.CONFIGS["llama-grouped"] | FEW_TOKENS), dtype="float32"
    )
    ends, prompt = set(llm.end_tokens), [1, 2, 3]
    assert 6 in ends
    answers = [(0.0, prompt)]
    done = []
    for step in (1, 2, 3):
        grown = [(total + p, [*tokens, token])
                 for total, tokens in answers for token, p in enumerate(next_logprobs(llm, tokens))]  # fmt: skip
        done += [(total / step, tokens) for total, tokens in grown if step == 3 or tokens[-1] in ends]
        answers = [(total, tokens) for total, tokens in grown if tokens[-1] not in ends]
    assert len(done) == 1 + 6 + 36 * 7
    [output] = llm.beam_search([prompt], BeamSearchParams(beam_width=50, max_tokens=3))
    assert [s.tokens for s in output.sequences] == [tokens for _, tokens in sorted(done, reverse=True)[:50]]
    [short] = llm.beam_search([prompt], BeamSearchParams(beam_width=50, max_tokens=1))
    assert sorted(s.tokens[-1] for s in short.sequences) == list(range(7))  # all there are
    assert math.fsum(math.exp(s.cum_logprob) for s in short.sequences) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_one_beam_is_greedy(ignore_eos: bool, ending: Callable[[str], LLM]) -> None:
    reasons = set()
    for name in FAMILIES:
        llm = ending(name)
        prompts = [checkpoints.token_ids(5 + 9 * seed, seed=seed) for seed in range(6)]
        greedy = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=ignore_eos))
        beams = llm.beam_search(prompts, BeamSearchParams(beam_width=1, max_tokens=20, ignore_eos=ignore_eos))
        for prompt, output, expected in zip(prompts, beams, greedy, strict=True):
            [only], answer = output.sequences, expected.outputs[0]
            assert (only.tokens, only.finish_reason) == (prompt + answer.token_ids, answer.finish_reason)
            reasons.add(only.finish_reason)
    assert reasons == ({"length"} if ignore_eos else {"stop", "length"})


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_together_are_as_each_alone(name: str, ending: Callable[[str], LLM]) -> None:
    """To the bit, also where little fits into the cache and nothing is remembered."""
    llm = ending(name)
    prompts = [checkpoints.token_ids(1 + 13 * seed, seed=seed) for seed in range(5)]
    params = BeamSearchParams(beam_width=3, max_tokens=9)
    together = [facts(output) for output in llm.beam_search(prompts, params)]
    assert together == [facts(llm.beam_search([prompt], params)[0]) for prompt in prompts]
    small = LLM(llm.path, dtype="float32", max_num_seqs=2, max_num_batched_tokens=7, enable_prefix_caching=False)
    assert together == [facts(output) for output in small.beam_search(prompts, params)]
    for answers in together:
        assert len(answers) == 3 and all(better[3] >= worse[3] for better, worse in pairwise(answers))


@pytest.mark.parametrize(("name", "most"), [("granite-hybrid", 1), ("llama-grouped", 8.5)])
def test_a_step_computes_what_is_new(name: str, most: float, folder_of: Callable[[str], Path]) -> None:
    """A token a beam where a state is taken over; of keys and values full blocks are: 1 to 16 tokens in turn.

    Prompts have no more beams at once than can run, else 80 would push each other's states out of the cache.
    """
    width, steps = 8, 33  # the first has one beam; then twice each place in a block
    prompts = [checkpoints.token_ids(32, seed=seed) for seed in range(10)]
    llm = LLM(folder_of(name), dtype="float32")
    llm.beam_search(prompts, BeamSearchParams(beam_width=width, max_tokens=steps, ignore_eos=True))
    stats, beams = llm.stats(), len(prompts) * width * (steps - 1)
    assert stats.requests == len(prompts) + beams
    assert stats.prompt_tokens - stats.cached_tokens <= len(prompts) * 32 + most * beams


def test_the_context_ends_a_search(llm_of: Callable[..., LLM]) -> None:
    llm = llm_of("llama")
    prompts = [checkpoints.token_ids(llm.max_model_len - left, seed=left) for left in (1, 3, 30)]
    outputs = llm.beam_search(prompts, BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True))
    assert [len(s.tokens) - len(o.prompt_token_ids) for o in outputs for s in o.sequences] == [1] * 3 + [3] * 3 + [
        5
    ] * 3
    assert {s.finish_reason for output in outputs for s in output.sequences} == {"length"}


def test_text_has_the_prompt_and_the_end_where_it_is_asked_for(ending: Callable[[str], LLM]) -> None:
    llm = ending("llama-grouped")
    for prompt in ("a good day", "say <|user|> "):
        plain, whole = (
            llm.beam_search(prompt, BeamSearchParams(beam_width=4, max_tokens=12, include_stop_str_in_output=with_end))[
                0
            ].sequences
            for with_end in (False, True)
        )
        assert {s.finish_reason for s in plain} == {"stop", "length"}
        for short, long in zip(plain, whole, strict=True):
            new = short.tokens[len(llm.tokenizer.encode(prompt)) :]
            body = new[:-1] if short.finish_reason == "stop" else new
            assert short.tokens == long.tokens and short.text == prompt + llm.tokenizer.decode(body)
            end = llm.tokenizer.decode(new[len(body) :], skip_special_tokens=False)
            assert long.text == short.text + end and bool(end) == (short.finish_reason == "stop")
    ids = [*"é".encode()][:1]  # a character that the answer may complete
    for s in llm.beam_search([ids], BeamSearchParams(beam_width=2, max_tokens=3, ignore_eos=True))[0].sequences:
        assert s.text == llm.tokenizer.decode(s.tokens)


def test_nothing_in_nothing_out(llm_of: Callable[..., LLM]) -> None:
    assert llm_of("llama").beam_search([], BeamSearchParams(beam_width=2, max_tokens=3)) == []


def test_a_bar_counts_tokens(llm_of: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, int, int]] = []
    monkeypatch.setattr("sys.stderr", io.StringIO())
    draw = ProgressBar.__call__
    monkeypatch.setattr(
        ProgressBar, "__call__", lambda self, *told: (self.is_shown and drawn.append(told), draw(self, *told))[1]
    )
    params = BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True)
    for wanted in (False, None):
        llm_of("llama").beam_search([[1], [2]], params, progress_bar=wanted)
    assert drawn == []
    llm_of("llama").beam_search([[1], [2]], params, progress_bar=True)
    assert drawn == [("tokens", done, 8) for done in (2, 4, 6, 8)]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "says"),
    [
        ([], 4, "The prompt is empty"),
        ([1] * 128, 4, "The prompt has 128 tokens"),
        ([261], 4, "Token id 261 is outside"),
        (None, 4, "A prompt is text or a list of token ids"),
    ],
)
def test_a_prompt_that_cannot_be_served(prompt: Any, max_tokens: int, says: str, llm_of: Callable[..., LLM]) -> None:
    llm = llm_of("llama")
    steps = llm.stats().steps
    with refused("prompt", says):
        llm.beam_search([[1, 2], prompt], BeamSearchParams(beam_width=2, max_tokens=max_tokens))
    assert llm.stats().steps == steps  # before any is


def test_what_is_no_beam_search_params(llm_of: Callable[..., LLM]) -> None:
    with refused("params", "beam search takes BeamSearchParams(beam_width=, max_tokens=)"):
        llm_of("llama").beam_search([[1]], SamplingParams())
    with refused("sampling_params"):
        llm_of("llama").generate([[1]], BeamSearchParams(beam_width=1, max_tokens=1))


@pytest.mark.parametrize(
    ("name", "value", "range_"),
    [
        ("beam_width", 0, "a whole number between 1 and 50"),
        ("beam_width", 51, "a whole number between 1 and 50"),
        ("beam_width", 2.0, "a whole number between 1 and 50"),
        ("beam_width", True, "a whole number between 1 and 50"),
        ("max_tokens", 0, "a whole number of at least 1"),
        ("max_tokens", None, "a whole number of at least 1"),
        ("temperature", 0.7, "0: beam search does not sample"),
        ("length_penalty", 10.5, "between -10 and 10"),
        ("length_penalty", float("nan"), "between -10 and 10"),
        ("length_penalty", "long", "between -10 and 10"),
        ("ignore_eos", 1, "True or False"),
        ("include_stop_str_in_output", "yes", "True or False"),
    ],
)
def test_a_value_outside_its_range(name: str, value: Any, range_: str) -> None:
    with pytest.raises(RequestError, match=f"^{name} is {re.escape(repr(value))}; it must be {range_}"):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 2} | {name: value})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("top_k", "beam search does not sample"),
        ("top_p", "beam search does not sample"),
        ("min_p", "beam search does not sample"),
        ("seed", "beam search does not sample"),
        ("presence_penalty", "beam search does not sample"),
        ("stop", "SamplingParams has: beam search takes beam_width, max_tokens"),
        ("n", "SamplingParams has: beam search takes beam_width, max_tokens"),
        ("beam_size", "Did you mean 'beam_width'"),
        ("length_penalti", "Did you mean 'length_penalty'"),
        ("xyz", "$"),
    ],
)
def test_an_option_that_is_none(name: str, says: str) -> None:
    with pytest.raises(RequestError, match=f"^BeamSearchParams has no option {name!r}.*{says}"):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 2, name: 1})


def test_a_sequence_is_plain_data() -> None:
    assert BeamSearchSequence([1]) == BeamSearchSequence(tokens=[1], logprobs=[], cum_logprob=0.0, text="")
