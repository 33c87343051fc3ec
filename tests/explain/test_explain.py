"""What an explanation shows is what the engine computes, and what transformers says of the same checkpoint."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from oracles import Oracle

from tinyserve import LLM, SamplingParams, StructuredOutputs
from tinyserve.errors import RequestError, TinyserveError, UserError
from tinyserve.explain import explain as module
from tinyserve.explain import taps
from tinyserve.explain.explanation import softmax
from tinyserve.explain.taps import attention_weights

LLMOf = Callable[..., LLM]

NAMES = list(checkpoints.CONFIGS)
IDS = checkpoints.token_ids(37, seed=3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_it_is_what_the_engine_computes(name: str, dtype: str, llm_of: LLMOf) -> None:
    llm = llm_of(name, dtype)
    told = llm.explain(IDS)
    np.testing.assert_array_equal(told.logits, llm.logits(IDS))
    for at in (0, 17, -1):
        np.testing.assert_array_equal(told.lens(at)[-1], told.logits[at])


@pytest.mark.parametrize("name", NAMES)
def test_streams_add_up_and_attention_sums_to_one(name: str, llm_of: LLMOf) -> None:
    llm = llm_of(name)
    told = llm.explain(IDS)
    assert told.stream.shape == (len(told.layers) + 1, len(IDS), llm.config.hidden_size)
    for i, layer in enumerate(told.layers):
        added = told.stream[i] + layer.mixer + layer.mlp
        assert checkpoints.error(added, told.stream[i + 1]) < 1e-6
        assert np.abs(layer.mixer).max() > 0 and np.abs(layer.mlp).max() > 0
        if layer.attention is not None:
            np.testing.assert_allclose(layer.attention.sum(axis=2), 1, rtol=1e-6)
            assert not np.triu(layer.attention, 1).any()
            assert (layer.dt, layer.decay, layer.state) == (None, None, None)


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_values_make_what_attention_adds(name: str, llm_of: LLMOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights, which NumPy computes, by the values are what the kernels have added."""
    made: list[np.ndarray] = []

    def noted(attention: Any, qkv: np.ndarray) -> np.ndarray:
        weights = attention_weights(attention, qkv)
        heads, kv_heads, head_dim = attention.heads
        v = qkv.reshape(len(qkv), -1, head_dim)[:, heads + kv_heads :]
        mixed = np.einsum("hqk,khd->qhd", weights, np.repeat(v, heads // kv_heads, axis=1))
        made.append(attention.out(np.ascontiguousarray(mixed.reshape(len(qkv), -1), np.float32)))
        return weights

    monkeypatch.setattr(taps, "attention_weights", noted)
    layers = [layer for layer in llm_of(name).explain(IDS).layers if layer.attention is not None]
    assert len(layers) == len(made) > 0
    for layer, out in zip(layers, made, strict=True):
        assert checkpoints.error(out, layer.mixer) < 1e-5


@pytest.mark.oracle
@pytest.mark.parametrize("name", NAMES)
def test_transformers_has_the_same_streams_and_weights(name: str, tmp_path: Path, oracle: Oracle) -> None:
    torch, transformers = oracle("torch"), oracle("transformers")
    raw = checkpoints.CONFIGS[name]
    folder = checkpoints.save_with_transformers(tmp_path, raw)
    # Where it is to return attention weights, transformers adds ALiBi's biases twice.
    has_weights = not raw.get("alibi")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager",
        attn_implementation="eager" if has_weights else "sdpa",
    ).eval()  # fmt: skip
    with torch.no_grad():
        expected = model(torch.tensor([IDS]), output_hidden_states=True, output_attentions=has_weights, use_cache=False)
    told = LLM(folder, dtype="float32").explain(IDS)
    # The last of theirs is behind the last norm.
    for ours, theirs in zip(told.stream[:-1], expected.hidden_states[:-1], strict=True):
        assert checkpoints.error(ours, theirs[0].numpy()) < 1e-4
    if has_weights:
        weights = [layer.attention for layer in told.layers if layer.attention is not None]
        others = [one[0].numpy() for one in expected.attentions if one is not None]
        assert len(weights) == len(others) > 0
        for mine, other in zip(weights, others, strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if "hybrid" in name])
def test_a_mambas_state_is_what_its_steps_come_to(name: str, llm_of: LLMOf) -> None:
    llm = llm_of(name)
    told = llm.explain(IDS)
    mambas = [i for i, layer in enumerate(told.layers) if layer.decay is not None]
    assert mambas
    for i in mambas:
        layer = told.layers[i]
        assert layer.decay is not None and layer.dt is not None and layer.state is not None
        assert layer.decay.shape == layer.dt.shape == (len(IDS), layer.state.shape[0])
        assert ((layer.decay > 0) & (layer.decay <= 1)).all() and (layer.dt >= 0).all()
        half = told.half_life(i)
        np.testing.assert_allclose(np.exp(-np.log(2) / half), np.exp(np.log(layer.decay).mean(axis=0)), rtol=1e-9)
        # What a head keeps of its state is all that is left of it where nothing is written.
        shorter = llm.explain(IDS[:-1]).layers[i]
        assert shorter.state is not None
        kept = layer.decay[-1][:, None, None] * shorter.state
        written = (layer.state - kept).reshape(len(kept), -1)
        assert np.linalg.matrix_rank(layer.state[0] - kept[0], tol=1e-4 * np.abs(written).max()) <= 1
    attention = next(i for i, layer in enumerate(told.layers) if layer.attention is not None)
    with pytest.raises(ValueError, match="is an attention layer"):
        told.half_life(attention)


def test_guesses_and_norms(llm_of: LLMOf) -> None:
    told = llm_of("gpt2").explain("the cat")
    assert told.prompt == "the cat" and "".join(told.pieces) == "the cat"
    best = told.guesses(told.logits[-1], 3)
    assert [one.token_id for one in best] == np.argsort(-told.logits[-1])[:3].tolist()
    assert best[0].probability == pytest.approx(softmax(told.logits[-1]).max())
    np.testing.assert_allclose(told.norms(2), np.linalg.norm(told.stream[:, 2], axis=1), rtol=1e-6)
    assert "Explanation(" in repr(told) and len(repr(told)) < 3000


def test_costs_are_all_weights_that_a_token_needs(llm_of: LLMOf) -> None:
    llm = llm_of("llama")  # its head is its own
    costs = {cost.part: cost for cost in llm.explain(IDS).costs}
    assert list(costs)[:3] == ["embedding", "layer 0 attention", "layer 0 mlp"] and list(costs)[-1] == "head"
    numbers = {
        name: int(np.prod(tensor.shape))
        for name, tensor in checkpoints.tensors_of(checkpoints.CONFIGS["llama"]).items()
    }
    attention = sum(count for name, count in numbers.items() if "layers.1.self_attn" in name)
    assert costs["layer 1 attention"].operations == 2 * attention
    assert costs["head"].operations == 2 * numbers["lm_head.weight"]
    assert sum(cost.nbytes for cost in costs.values()) <= llm.model.nbytes


def test_of_experts_those_are_counted_that_a_token_is_sent_to(llm_of: LLMOf) -> None:
    raw = checkpoints.CONFIGS["granite-moe"]
    costs = {cost.part: cost.operations for cost in llm_of("granite-moe").explain(IDS).costs}
    hidden, inner, asked = raw["hidden_size"], raw["intermediate_size"], raw["num_experts_per_tok"]
    least = 2 * 3 * hidden * inner * asked
    assert least <= costs["layer 0 mixture"] <= 1.6 * least  # rows are padded, and there is a router


def test_an_explanation_keeps_its_model(folder_of: Callable[[str], Path]) -> None:
    told = LLM(folder_of("gpt2"), num_threads=1).explain("the cat")
    gc.collect()
    np.testing.assert_array_equal(told.lens()[-1], told.logits[-1])


# --- the sampling chain -----------------------------------------------------------------------------------------------


def test_the_chain_is_told_step_by_step(llm_of: LLMOf) -> None:
    llm = llm_of("llama")
    asked: dict[str, Any] = {
        "logit_bias": {5: 3.0}, "banned_token_ids": [7, 8], "repetition_penalty": 1.3, "temperature": 0.7,
        "top_k": 20, "top_p": 0.8, "min_p": 0.01,
    }  # fmt: skip
    told = llm.explain(IDS, SamplingParams(**asked))
    names = [step.name for step in told.sampling]
    assert names == ["logits", "banned_token_ids", "logit_bias", "penalties", "temperature", "min_p", "top_k", "top_p"]
    by_name = {step.name: step for step in told.sampling}
    assert by_name["logits"].left == llm.config.vocab_size and by_name["banned_token_ids"].removed == 2
    assert by_name["logit_bias"].changed == 1 and by_name["penalties"].changed == len(set(IDS) - {7, 8})
    assert by_name["penalties"].value == {"repetition_penalty": 1.3}
    for before, step in zip(told.sampling, told.sampling[1:], strict=False):
        assert step.left == before.left - step.removed == (step.probabilities > 0).sum()
        assert step.probabilities.sum() == pytest.approx(1)
    assert by_name["top_k"].left <= 20
    # What may be drawn is what is drawn.
    answers = llm.generate(IDS, SamplingParams(**asked, max_tokens=1, n=200, seed=1))[0].outputs
    drawn = {answer.token_ids[0] for answer in answers}
    assert drawn <= set(np.flatnonzero(told.sampling[-1].probabilities).tolist()) and len(drawn) > 1


def test_at_temperature_zero_the_largest_is_chosen(llm_of: LLMOf) -> None:
    llm = llm_of("llama")
    told = llm.explain(IDS, SamplingParams(temperature=0, top_k=5))
    assert [step.name for step in told.sampling] == ["logits", "choice"]
    (chosen,) = told.likeliest(told.sampling[-1].probabilities)
    assert chosen.token_id == llm.generate(IDS, SamplingParams(temperature=0, max_tokens=1))[0].outputs[0].token_ids[0]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_explained_is_a_sentence(llm_of: LLMOf, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = llm_of("llama")
    monkeypatch.setattr(module, "MOST_TOKENS", 10)
    with pytest.raises(RequestError, match="has 37 tokens, and an explanation is of 10 at most"):
        llm.explain(IDS)
    with pytest.raises(RequestError, match="no structured outputs"):
        llm.explain("the", SamplingParams(structured_outputs=StructuredOutputs(choice=["a", "b"])))
    with pytest.raises(RequestError):
        llm.explain([])


def test_damaged_weights_are_a_sentence(tmp_path: Path) -> None:
    tensors = dict(checkpoints.tensors_of(checkpoints.CONFIGS["gpt2"]))
    tensors["h.2.mlp.c_proj.bias"] = np.full_like(tensors["h.2.mlp.c_proj.bias"], 3e38)
    tensors["ln_f.weight"] = np.full_like(tensors["ln_f.weight"], 3e38)
    llm = LLM(checkpoints.write_folder(tmp_path, checkpoints.CONFIGS["gpt2"], tensors), dtype="float32")
    with pytest.raises(TinyserveError, match="logits that are not numbers"):
        llm.explain(IDS)


def test_requests_go_on_beside_it(llm_of: LLMOf) -> None:
    llm = llm_of("granite-hybrid")
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    alone = llm.generate(IDS, params)[0].outputs[0].token_ids
    stream = llm.stream(IDS, params)
    first = next(iter(stream))
    told = llm.explain(IDS)
    rest = list(stream)
    assert [token for chunk in (first, *rest) for token in chunk.token_ids] == alone
    np.testing.assert_array_equal(told.logits, llm.logits(IDS))


@pytest.mark.parametrize("name", ["llama-grouped", "granite-hybrid"])
def test_a_figure(name: str, llm_of: LLMOf, tmp_path: Path) -> None:
    told = llm_of(name).explain("the cat")
    figure = told.plot()
    assert told.last_attention == (2 if name == "llama-grouped" else 1)
    heads = told.layers[told.last_attention].attention
    assert heads is not None and len(figure.axes) == 1 + len(heads)
    for axes, weights in zip(figure.axes[1:], heads, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), weights)
    figure.savefig(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 5000
    if name == "granite-hybrid":
        (image,) = told.plot(layer=0).axes[1].images
        np.testing.assert_array_equal(image.get_array(), told.layers[0].decay.T)  # type: ignore[union-attr]


def test_without_matplotlib_a_figure_is_a_sentence(llm_of: LLMOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'tinyserve\[plot\]'"):
        llm_of("llama").explain("the cat").plot()
