"""The zoo: the models that come with tinyserve are transformers' to rounding, and what they write is English.

Real weights of families whose others cannot be had without a network: GPT-2, Falcon and hybrids.
"""

import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import error, transformers_logits

from tinyserve import LLM, SamplingParams
from tinyserve.checkpoints import presets
from tinyserve.evaluation.perplexity import cross_entropy, kl_divergence
from tinyserve.models.config import preset_config
from tinyserve.models.config.costs import parameter_count

TESTS = Path(__file__).parents[1]
TEXTS = TESTS.parent / "scripts" / "zoo" / "texts"
GOLDEN = json.loads((TESTS / "golden" / "zoo.json").read_text(encoding="utf-8"))["models"]
STORIES = (TESTS / "data" / "stories.txt").read_text(encoding="utf-8")
ZOO = [preset for preset in map(presets.get, presets.names()) if preset.folder is not None]
NAMES = [preset.name for preset in ZOO]
GREEDY = SamplingParams(temperature=0, max_tokens=40, logprobs=0)


@pytest.fixture(scope="module", params=NAMES)
def exact(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM(request.param, dtype="float32", max_model_len=512) as llm:
        yield llm


@pytest.fixture(scope="module")
def learned() -> set[str]:
    """The words of the texts that the zoo was trained on."""
    texts = (lzma.decompress(part.read_bytes()).decode() for part in TEXTS.glob("part-*.jsonl.xz"))
    return {word for text in texts for word in re.findall(r"[a-z]+", text.lower())}


def folder_of(name: str) -> Path:
    folder = presets.get(name).folder
    assert folder is not None
    return folder


def test_four_families_and_a_smaller_one_are_there() -> None:
    assert {preset.family for preset in ZOO} == {"gpt2", "falcon", "llama", "granite"}
    assert set(NAMES) == set(GOLDEN) and len(NAMES) == 5
    assert sum(file.stat().st_size for name in NAMES for file in folder_of(name).iterdir()) <= 16_500_000


@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_it_is(name: str) -> None:
    preset, card = presets.get(name), (folder_of(name) / "README.md").read_text(encoding="utf-8")
    assert preset.parameters == parameter_count(preset_config(name)) == GOLDEN[name]["parameters"]
    assert f"# {name}\n" in card and f"{preset.parameters:,} parameters" in card
    for row in ("Data", "Tokenizer", "Recipe", "Loss", "Licence"):
        assert f"\n| {row} | " in card


def test_logits_are_transformers(exact: LLM) -> None:
    ids = exact.tokenizer.encode(STORIES)[:400]
    assert error(exact.logits(ids), transformers_logits(folder_of(exact.name), ids)) <= 1e-4


def test_a_prompts_logits_and_answer_are_the_goldens(exact: LLM) -> None:
    for row in GOLDEN[exact.name]["prompts"]:
        assert exact.tokenizer.encode(row["prompt"]) == row["token_ids"]
        logits = exact.logits(row["token_ids"], last=1)[0]
        assert np.abs(logits[row["tokens"]] - row["logits"]).max() <= 1e-4 * row["largest"]
        (output,) = exact.generate({"prompt_token_ids": row["token_ids"]}, GREEDY)
        assert list(output.outputs[0].token_ids) == row["written"]


def test_the_cache_has_what_the_whole_text_gives(exact: LLM) -> None:
    for row in GOLDEN[exact.name]["prompts"]:
        (output,) = exact.generate({"prompt_token_ids": row["token_ids"]}, GREEDY)
        answer = output.outputs[0]
        whole = exact.logits([*row["token_ids"], *answer.token_ids])[len(row["token_ids"]) - 1 : -1]
        for logits, told, token in zip(whole, answer.logprobs, answer.token_ids, strict=True):
            assert abs(-cross_entropy(logits[None], [token]) - float(told[token])) <= 1e-4


def test_its_loss_on_stories_it_never_read_is_the_goldens(exact: LLM) -> None:
    ids = exact.tokenizer.encode(STORIES.strip())
    windows = [ids[start : start + 256] for start in range(0, len(ids) - 1, 256)]
    losses = [cross_entropy(exact.logits(window)[:-1], window[1:]) for window in windows if len(window) > 1]
    weights = [len(window) - 1 for window in windows if len(window) > 1]
    assert np.average(losses, weights=weights) == pytest.approx(GOLDEN[exact.name]["loss"], abs=1e-3)


@pytest.mark.parametrize(("dtype", "most"), [("int8", 0.002), ("w8a8", 0.005), ("int4", 0.1)])
@pytest.mark.parametrize("name", NAMES)
def test_fewer_bits_cost_little(name: str, dtype: str, most: float) -> None:
    """Nats a token that the predictions are from float32's: on real weights, and real text."""
    with LLM(name, dtype="float32", max_model_len=512) as exact, LLM(name, dtype=dtype, max_model_len=512) as packed:
        ids = exact.tokenizer.encode(STORIES)[:512]
        assert 0 < kl_divergence(exact.logits(ids), packed.logits(ids)) <= most


@pytest.mark.parametrize("name", NAMES)
def test_it_tells_a_story_in_words_it_learned(name: str, learned: set[str]) -> None:
    with LLM(name, max_model_len=512) as llm:
        params = SamplingParams(temperature=0.6, top_p=0.9, max_tokens=120, seed=1, n=4)
        (output,) = llm.generate("Once upon a time", params)
    for answer in output.outputs:
        words = re.findall(r"[a-z]+", answer.text.lower())
        assert len(words) > 20
        assert sum(word in learned for word in words) >= 0.93 * len(words), answer.text
        assert len(set(words)) >= 0.3 * len(words), answer.text


@pytest.mark.parametrize("name", ["tiny-granite", "tiny-gpt2"])
def test_a_prefix_in_the_cache_changes_no_bit(name: str) -> None:
    """A hybrid's cache holds the states of its Mamba2 layers as well."""
    opening = STORIES[:900]
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=0)
    with LLM(name, max_model_len=512) as llm:
        (first,) = llm.generate(opening, params)
        (again,) = llm.generate(opening, params)
        (other,) = llm.generate(opening + " The next day", params)
    with LLM(name, max_model_len=512, enable_prefix_caching=False) as llm:
        (alone,) = llm.generate(opening + " The next day", params)
    assert first.metrics.cached_tokens == 0 < other.metrics.cached_tokens
    for one, same in ((first, again), (alone, other)):
        assert one.outputs[0].token_ids == same.outputs[0].token_ids
        assert one.outputs[0].cumulative_logprob == same.outputs[0].cumulative_logprob


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_smaller_one_drafts(dtype: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=100)
    prompts = [row["prompt"] for row in GOLDEN["tiny-llama"]["prompts"]]
    config = {"method": "draft_model", "model": "tinier-llama"}
    with LLM("tiny-llama", dtype=dtype, max_model_len=512) as llm:
        plain = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
    with LLM("tiny-llama", dtype=dtype, max_model_len=512, speculative_config=config) as llm:
        drafted = [llm.generate(prompt, params)[0].outputs[0].token_ids for prompt in prompts]
        stats = llm.stats()
    assert drafted == plain
    assert stats.draft_tokens > 0
    assert stats.accepted_tokens >= 0.2 * stats.draft_tokens
