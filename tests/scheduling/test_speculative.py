"""Speculative decoding changes nothing but the number of steps: the same bits for every family, accepted or not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from conftest import DTYPES, answers, cache_bytes
from drafts import NGRAM, Spoiled, assert_all_is_free
from hypothesis import given
from hypothesis import strategies as st

from tinyserve import LLM, SamplingParams, StructuredOutputs
from tinyserve.checkpoints import presets
from tinyserve.errors import UserError
from tinyserve.scheduling.sequence import Sequence
from tinyserve.scheduling.speculative import NgramProposer, SpeculativeConfig
from tinyserve.scheduling.step_cost import StepCostModel

FAMILIES = ["gpt2", "llama-grouped", "falcon-7b", "falcon-rw", "granite-moe", "granite-hybrid", "granite-hybrid-moe"]
REPEATING = checkpoints.token_ids(7, seed=1) * 3
PROMPTS = [REPEATING, checkpoints.token_ids(20, seed=2), REPEATING[:12], [5, 6] * 9]


def sequence_of(tokens: list[int]) -> Sequence:
    return Sequence(0, tokens, SamplingParams())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_speculative_decoding_changes_no_bit(name: str, dtype: str, folder_of: Callable[[str], Path]) -> None:
    """Greedy and drawn, alone and together, in small chunks, with a cache that runs out, and over cached prefixes."""
    params = [
        SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, logprobs=3),
        SamplingParams(temperature=0.2, seed=7, max_tokens=40, ignore_eos=True, logprobs=3),
        SamplingParams(temperature=0, max_tokens=37, ignore_eos=True, logprobs=3, prompt_logprobs=1),
        SamplingParams(temperature=0, max_tokens=60, stop_token_ids=[7, 8, 9], logprobs=3),
    ]
    plain = LLM(folder_of(name), dtype=dtype, num_threads=1, enable_prefix_caching=False)
    expected = answers([plain.generate([p], one)[0] for p, one in zip(PROMPTS, params, strict=True)])
    draft_tokens = accepted_tokens = 0
    for options in ({"num_threads": 1}, {"num_threads": 2, "max_num_batched_tokens": 24, "max_num_seqs": 3}):
        llm = LLM(folder_of(name), dtype=dtype, speculative_config=NGRAM, **options)
        Spoiled(llm)
        for _ in range(2):  # the second time from the cache
            assert answers([llm.generate([p], one)[0] for p, one in zip(PROMPTS, params, strict=True)]) == expected
            assert answers(llm.generate(PROMPTS, params)) == expected
        stats = llm.stats()
        draft_tokens, accepted_tokens = draft_tokens + stats.draft_tokens, accepted_tokens + stats.accepted_tokens
        assert_all_is_free(llm)
    assert 0 < accepted_tokens < draft_tokens


CHANGED = [
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.7, "presence_penalty": -0.3},
    {"frequency_penalty": -2.0},  # which says the same again and again
    {"logit_bias": {7: 9.0, 8: 8.5, 9: -5.0}},
    {"allowed_token_ids": [3, 5, 7, 9], "banned_token_ids": [5]},
    {"bad_words": ["a", "th", "bc"]},
    {"min_tokens": 25, "stop_token_ids": [*range(0, checkpoints.VOCAB, 2)]},
]


@pytest.mark.parametrize("name", ["llama-grouped", "granite-hybrid"])
def test_logits_behind_draft_tokens_are_processed_as_if_they_had_been_sampled(
    name: str, folder_of: Callable[[str], Path], llm_of: Callable[..., LLM]
) -> None:
    llm = LLM(folder_of(name), dtype="float32", num_threads=1, max_num_seqs=6, speculative_config=NGRAM)
    spoiled = Spoiled(llm)
    for temperature in (0.0, 0.4):
        params = [
            SamplingParams(temperature=temperature, seed=3, max_tokens=45, logprobs=2, **changed) for changed in CHANGED
        ]
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
        assert answers(llm.generate(prompts, params)) == answers(llm_of(name).generate(prompts, params))
    assert llm.stats().accepted_tokens > 20 and len(spoiled.places) > 3
    assert_all_is_free(llm)


STRUCTURES = [
    {"regex": "[a-f]{3}(-[0-9]{2}){2,9}!"},
    {"choice": ["yes", "no", "perhaps perhaps perhaps"]},
    {"grammar": 'start: "(" start ")" | "x"'},
    {
        "json": {
            "type": "object", "properties": {"aaaa": {"type": "boolean"}}, "required": ["aaaa"],
            "x-guidance": {"whitespace_pattern": r" |\n {0,24}"},  # drafts go wrong in more places
        }
    },
]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "granite-hybrid"])
def test_grammars_give_the_same_tokens(name: str, folder_of: Callable[[str], Path], llm_of: Callable[..., LLM]) -> None:
    """Each place has the mask behind the draft tokens before it; beside others, and several answers to a prompt."""
    llm = LLM(folder_of(name), dtype="float32", num_threads=1, max_num_seqs=6, speculative_config=NGRAM)
    spoiled = Spoiled(llm)
    prompts = [list(b'{"aaaa": true}' + b"((((x)))) abc-12-12-12-12! perhaps perhaps") for _ in STRUCTURES]
    for temperature in (0.0, 1.0):
        params = [
            SamplingParams(
                temperature=temperature, seed=1, n=2, max_tokens=60, logprobs=2,
                structured_outputs=StructuredOutputs(**spec),  # type: ignore[arg-type]
            )
            for spec in STRUCTURES
        ]  # fmt: skip
        outputs = llm.generate(prompts, params)
        assert answers(outputs) == answers(llm_of(name).generate(prompts, params))
    assert llm.stats().accepted_tokens > 20 and len(spoiled.places) > 2
    assert_all_is_free(llm)


@pytest.mark.parametrize("name", ["llama", "granite-hybrid"])
def test_forced_tokens_of_a_grammar_are_drafted(
    name: str, folder_of: Callable[[str], Path], llm_of: Callable[..., LLM]
) -> None:
    """Nothing of it was said before; and where the model says it in other tokens, it is given up."""
    llm = LLM(folder_of(name), dtype="float32", num_threads=1, max_num_seqs=6, speculative_config=NGRAM)
    long = "abcdefghijklmnopqrstuvwxyz, 0123456789"
    for text, is_spelt_otherwise in ((long, False), ("the" * 20, True)):
        params = SamplingParams(
            temperature=1.0, seed=2, max_tokens=80, structured_outputs=StructuredOutputs(choice=[text])
        )
        before = llm.stats()
        outputs = llm.generate(PROMPTS[:2], params)
        assert answers(outputs) == answers(llm_of(name).generate(PROMPTS[:2], params))
        after = llm.stats()
        assert outputs[0].outputs[0].text == text
        accepted = after.accepted_tokens - before.accepted_tokens
        if not is_spelt_otherwise:
            assert accepted == after.draft_tokens - before.draft_tokens >= len(long)
            assert after.steps - before.steps < len(long) // 2
    assert not llm.engine.scheduler.speculation._forced_acceptance  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["llama-grouped", "granite-hybrid"])
def test_speculative_decoding_beside_preemption(name: str, folder_of: Callable[[str], Path]) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=2)
    plain = LLM(folder_of(name), dtype="float32", num_threads=1)
    small = LLM(folder_of(name), dtype="float32", num_threads=1, max_model_len=112, speculative_config=NGRAM,
                max_num_seqs=4, kv_cache_memory=cache_bytes(plain, 13, 9))  # fmt: skip
    Spoiled(small)
    outputs = small.generate(PROMPTS, params)
    assert answers(outputs) == answers(plain.generate(PROMPTS, params))
    assert sum(output.metrics.preemptions for output in outputs) > 0 and small.stats().accepted_tokens > 0
    assert_all_is_free(small)


def test_rollback_of_states_of_a_real_shape(tmp_path: Path) -> None:
    """Four layers as wide as granite-350m's: the states of 48 heads, behind rejections at any place."""
    raw = dict(presets.get("granite-350m").raw_config)
    raw |= {"num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "attention", "mamba"], "vocab_size": 512}
    raw |= {name: 1 for name in raw if name.endswith("_token_id")}
    folder = tmp_path / "granite"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    options: dict[str, Any] = {"load_format": "dummy", "dtype": "int8", "max_model_len": 128, "max_num_seqs": 2}
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=2)
    llm = LLM(folder, **options, speculative_config=NGRAM)
    spoiled = Spoiled(llm)
    expected = answers(LLM(folder, **options).generate(PROMPTS[:2], params))
    assert answers(llm.generate(PROMPTS[:2], params)) == expected
    assert llm.stats().accepted_tokens > 20 and len(spoiled.places) > 3


def test_a_stream_gets_one_token_a_chunk(folder_of: Callable[[str], Path]) -> None:
    llm = LLM(folder_of("gpt2"), dtype="float32", num_threads=1, speculative_config=NGRAM)
    Spoiled(llm)
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    chunks = list(llm.stream(PROMPTS[3], params))
    assert [token for chunk in chunks for token in chunk.token_ids] == llm.generate([PROMPTS[3]], params)[0].outputs[
        0
    ].token_ids
    assert len(chunks[-1].metrics.token_times) == 50
    assert llm.stats().accepted_tokens > 0


# --- prompt lookup ------------------------------------------------------------------------------------------------


def free(**options: Any) -> NgramProposer:
    """A proposer for a model to which a draft token costs nothing."""
    proposer = NgramProposer(**{"num_tokens": 11, "max_ngram": 6, "min_ngram": 1} | options)
    proposer.step_cost = FreeTokens()
    return proposer


class FreeTokens(StepCostModel):
    def predict(self, num_tokens: int) -> float:
        return 1.0


def test_it_goes_on_as_the_text_did() -> None:
    def draft(tokens: list[int], most: int) -> list[int]:
        [draft] = free(num_tokens=16, max_ngram=3, min_ngram=2).propose([sequence_of(tokens)], [most])
        return draft

    assert draft([1, 2, 3, 4, 5, 1, 2], 4) == [3, 4, 5, 1]
    assert draft([1, 2, 3, 4, 5, 1, 2], 2) == [3, 4]
    assert draft([1, 2, 1, 2], 7) == [1, 2, 1, 2, 1, 2, 1], "round and round"
    assert draft([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 1) == [9], "the longest match"
    assert draft([1, 2, 7, 1, 2, 8, 1, 2], 1) == [8], "the latest one"
    assert draft([1, 2, 3], 5) == draft([4], 5) == draft([1, 1], 5) == []
    assert len(draft([1, 2] * 20, 99)) == 16


def test_acceptance_of_drafts_that_were_never_tried() -> None:
    """Where a text never goes on as before, nothing is tried, and nothing was tried to find out."""
    proposer = NgramProposer(num_tokens=11, max_ngram=6, min_ngram=1)
    for rows in (1, 5, 9, 1):
        proposer.record_step(rows, 10.0 + rows)
    same, other = sequence_of([1, 2, 3, 4, 5]), sequence_of([1, 2, 3, 4, 5])
    lengths: list[tuple[int, int]] = []
    for i in range(40):
        same.token_ids.append(1 + i % 5)
        other.token_ids.append([1, 2, 30 + i][i % 3])  # after 1, 2 comes something else each time
        drafts = proposer.propose([same, other], [99, 99])
        lengths.append((len(drafts[0]), len(drafts[1])))
    assert lengths[-1][0] == 11
    wrong = [count for _, count in lengths[1::3]]  # behind 1, 2
    assert sum(wrong[:4]) > 0 == sum(wrong[6:])
    proposer.remove(same)
    assert proposer._indices.keys() == {other}


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 39))
def test_a_text_that_grows_is_read_like_a_whole_one(tokens: list[int], cut: int) -> None:
    whole, parts = free(), free()
    sequence = sequence_of(tokens[:cut])
    parts.propose([sequence], [9])
    sequence.token_ids = list(tokens)
    other = sequence_of(tokens)
    [there], [here] = whole.propose([other], [9]), parts.propose([sequence], [9])
    assert parts._indices[sequence].ends == whole._indices[other].ends
    shorter = min(len(here), len(there))
    assert here[:shorter] == there[:shorter]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("ngram", "it is a mapping"), ({"methode": "ngram"}, "has 'methode'; .* num_speculative_tokens"),
        ({"method": "eagle"}, "'eagle'; there are ngram and draft_model"),
        ({"num_speculative_tokens": 0}, "0; it must be .* 1 to 64"),
        ({"prompt_lookup_max": 2.5}, "prompt_lookup_max is 2.5"),
        ({"prompt_lookup_min": 7}, "prompt_lookup_min is 7 .* 6"),
        ({"method": "draft_model"}, "model is ''; .* it names a smaller model"),
        ({"model": 5}, "model is 5"),
        ({"model": "a", "prompt_lookup_max": 3}, "has 'prompt_lookup_max'; .* draft_model"),
        ({"model": "a", "dtype": "int3"}, "dtype 'int3' is not built"),
    ],
)  # fmt: skip
def test_what_is_refused(config: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        LLM("nowhere", speculative_config=config)


def test_the_names_are_those_of_vllm() -> None:
    assert SpeculativeConfig.parse(None) is None
    assert SpeculativeConfig.parse({}) == SpeculativeConfig("ngram", 11, 6, 1)
    given = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
    assert SpeculativeConfig.parse(given) == SpeculativeConfig("ngram", 5, 3, 2)
    draft = SpeculativeConfig.parse({"model": "small", "num_speculative_tokens": 4})
    assert draft is not None and (draft.method, draft.model, draft.num_speculative_tokens) == (
        "draft_model",
        "small",
        4,
    )
