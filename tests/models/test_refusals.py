"""Weights that are not the config's: what is missing, misshapen or left over is named before anything is allocated."""

import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import checkpoints
import numpy as np
import pytest

from tinyserve import LLM
from tinyserve.checkpoints.checkpoint import Checkpoint, LazyTensor
from tinyserve.errors import CheckpointError, UserError
from tinyserve.models import build_model
from tinyserve.models.config import parse_config

CONFIGS = checkpoints.CONFIGS
FAMILIES = [
    *("gpt2", "gpt2-untied", "falcon-7b", "falcon-40b", "llama-grouped", "llama-biases", "mistral"),
    *("granite", "granite-moe", "granite-hybrid", "granite-hybrid-moe", "qwen2", "qwen3", "qwen3-head-dim"),
]
ACTIVATIONS = {"gpt2": "activation_function", "falcon": "activation"}  # elsewhere: hidden_act
Shapes = Mapping[str, tuple[int, ...]]


def load(name: str, shapes: Shapes, file: str) -> None:
    """Build a model of tensors that have shapes and no data: whoever reads one has gone too far."""

    def read() -> NoReturn:
        raise AssertionError("read before everything was checked")

    tensors = {key: LazyTensor(shape, file, read, name=key) for key, shape in shapes.items()}
    build_model(parse_config(CONFIGS[name]), Checkpoint(tensors, file), "float32", 32)


def refusal(name: str, shapes: Shapes, file: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(name, shapes, file)
    message = str(caught.value)
    assert message.startswith(file) and message.endswith(".") and "\n" not in message
    return message


def folder_shapes(name: str) -> Shapes:
    return {tensor.name: tensor.shape for tensor in parse_config(CONFIGS[name]).tensor_shapes()}


def gguf_shapes(name: str) -> Shapes:
    return {key: value.shape for key, value in checkpoints.gguf_tensors(CONFIGS[name]).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_of_a_folder_is_checked_before_any_is_read(name: str) -> None:
    shapes = folder_shapes(name)
    with pytest.raises(AssertionError, match="read before"):
        load(name, shapes, "x.safetensors")  # nothing is wrong with these
    for key, shape in shapes.items():
        less = {other: shapes[other] for other in shapes if other != key}
        assert f"no tensor {key!r}" in refusal(name, less, "x.safetensors")
        for wrong in ((*shape[:-1], shape[-1] + 1), (shape[0] - 1, *shape[1:]), (1, *shape), shape[:-1]):
            message = refusal(name, {**shapes, key: wrong}, "x.safetensors")
            assert f"tensor {key!r} has shape {list(wrong)}, but the config implies {list(shape)}" in message


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mistral"])
def test_every_tensor_of_a_gguf_is_checked_before_any_is_read(name: str) -> None:
    shapes = gguf_shapes(name)
    with pytest.raises(AssertionError, match="read before"):
        load(name, shapes, "x.gguf")
    for key, shape in shapes.items():
        less = {other: shapes[other] for other in shapes if other != key}
        refusal(name, less, "x.gguf")
        for wrong in ((*shape[:-1], shape[-1] + 1), (shape[0] + 1, *shape[1:]), (2, *shape)):
            assert key in refusal(name, {**shapes, key: wrong}, "x.gguf")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tensor_left_over_is_named(name: str) -> None:
    for shapes, file, extra in (
        (folder_shapes(name), "x.safetensors", "model.layers.0.self_attn.v_norm.weight"),
        (folder_shapes(name), "x.safetensors", "transformer.h.0.ln_3.weight"),
        (gguf_shapes(name), "x.gguf", "blk.0.attn_v_norm.weight"),
        (gguf_shapes(name), "x.gguf", "blk.2.ffn_up_odd.weight"),
    ):
        if name == "mistral" and file == "x.gguf":
            continue
        message = refusal(name, {**shapes, extra: (24,)}, file)
        assert f"tensor {extra!r} is no part of the model" in message
        assert "(nor are 2 others)" in refusal(name, {**shapes, extra: (24,), "a": (1,), "b": (2,)}, file)


@pytest.mark.parametrize("key", ["vocab_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"])
def test_sizes_that_no_weights_have_are_refused_before_memory_is_planned_by_them(key: str, tmp_path: Path) -> None:
    """By the tensor that has others, and not by the memory that they would take."""
    raw = CONFIGS["llama"] | {"num_key_value_heads": 1, "head_dim": 24}
    tensors = checkpoints.tensors_of(raw)
    folder = checkpoints.write_folder(tmp_path, raw | {key: 2**31 - 1 if key != "num_hidden_layers" else 4096}, tensors)
    with pytest.raises(CheckpointError, match=r"(tensor 'model\S* has shape|has no tensor 'model\.layers\.3)"):
        LLM(folder, kv_cache_memory=1 << 20)


def test_a_layer_too_many_and_a_bias_that_the_config_denies() -> None:
    shapes = folder_shapes("llama-grouped")
    more = {key.replace("layers.2", "layers.3"): shape for key, shape in shapes.items() if "layers.2" in key}
    assert "'model.layers.3." in refusal("llama-grouped", {**shapes, **more}, "x.safetensors")
    bias = {"model.layers.0.self_attn.q_proj.bias": (144,)}
    assert "'model.layers.0.self_attn.q_proj.bias'" in refusal("llama-grouped", {**shapes, **bias}, "x.safetensors")


def test_what_follows_from_the_config_may_lie_beside_the_weights() -> None:
    """transformers ignores these too: masks and frequencies that old versions saved."""
    for name, buffers in (
        ("gpt2", {"transformer.h.0.attn.bias": (1, 1, 128, 128), "h.1.attn.masked_bias": ()}),
        ("llama-grouped", {"model.layers.0.self_attn.rotary_emb.inv_freq": (12,)}),
    ):
        with pytest.raises(AssertionError, match="read before"):
            load(name, {**folder_shapes(name), **buffers}, "x.safetensors")


def test_an_expert_or_a_gate_without_its_other_half() -> None:
    """llama.cpp's converter takes them apart; one half alone is left over."""
    for name, part in (("granite-hybrid", "ffn_up"), ("granite-moe", "ffn_gate_exps")):
        shapes = gguf_shapes(name)
        less = {key: shape for key, shape in shapes.items() if key != f"blk.1.{part}.weight"}
        assert "no tensor 'model.layers.1." in refusal(name, less, "x.gguf")


@pytest.mark.parametrize("name", ["qwen3", "llama-grouped"])
def test_a_tied_model_has_no_head(name: str) -> None:
    shapes = folder_shapes(name)
    assert "lm_head.weight" not in shapes
    assert "'lm_head.weight'" in refusal(name, {**shapes, "lm_head.weight": (checkpoints.VOCAB, 144)}, "x.safetensors")


@pytest.mark.parametrize("is_gguf", [False, True])
def test_a_misshapen_last_tensor_costs_no_memory(is_gguf: bool, tmp_path: Path) -> None:
    raw = CONFIGS["llama"] | {"hidden_size": 320, "intermediate_size": 2048}
    tensors = checkpoints.gguf_tensors(raw) if is_gguf else checkpoints.tensors_of(raw)
    last = list(tensors)[-1]
    tensors[last] = np.ascontiguousarray(tensors[last][:-1])
    if is_gguf:
        path = checkpoints.write_gguf(tmp_path / "x.gguf", "llama", checkpoints.gguf_metadata(raw), tensors)
    else:
        path = checkpoints.write_folder(tmp_path, raw, tensors)
    weights = sum(value.nbytes for value in tensors.values())
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"{last!r}"):
            LLM(path, dtype="float32")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < weights / 4, f"{peak / 1e6:.1f} MB of {weights / 1e6:.1f} MB"


@pytest.mark.parametrize("name", [name for name in FAMILIES if "untied" not in name and "biases" not in name])
@pytest.mark.parametrize("asked", ["rope", "activation", "quantization"])
def test_what_is_not_built_is_refused_with_key_and_value(name: str, asked: str, tmp_path: Path) -> None:
    """At the door of the program: config.json is named, and nothing is read."""
    family = CONFIGS[name]["model_type"]
    key, value, said = {
        "rope": ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "'yarn'"),
        "activation": (ACTIVATIONS.get(family, "hidden_act"), "relu", "'relu'"),
        "quantization": ("quantization_config", {"quant_method": "gptq", "bits": 4}, "'gptq'"),
    }[asked]
    folder = checkpoints.write_folder(tmp_path, CONFIGS[name] | {key: value}, checkpoints.tensors_of(CONFIGS[name]))
    with pytest.raises(UserError, match=r"config\.json") as caught:
        LLM(folder)
    assert repr(key) in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *((name, "rope.scaling.type", "yarn") for name in FAMILIES if not name.startswith(("gpt2", "mistral"))),
        *((name, "rope.dimension_count", 12) for name in FAMILIES if not name.startswith(("gpt2", "mistral"))),
        *((name, "attention.causal", False) for name in FAMILIES if name != "mistral"),
        ("llama-grouped", "expert_count", 8),
        ("gpt2", "attention.head_count", 7),
        ("falcon-7b", "pooling_type", 1),
    ],
)
def test_metadata_that_ask_for_what_is_not_built(name: str, key: str, value: Any, tmp_path: Path) -> None:
    raw = CONFIGS[name]
    architecture = checkpoints.gguf_architecture(raw)
    metadata = checkpoints.gguf_metadata(raw) | {f"{architecture}.{key}": value}
    path = checkpoints.write_gguf(tmp_path / "x.gguf", architecture, metadata, checkpoints.gguf_tensors(raw))
    with pytest.raises(UserError, match=r"x\.gguf") as caught:
        LLM(path)
    said = "'n_embd' 120 is not a multiple of the 7" if "head_count" in key else f"{architecture}.{key}"
    assert said in str(caught.value) and str(value) in str(caught.value)


@pytest.mark.parametrize("name", ["llama-grouped", "granite", "granite-hybrid-rope"])
def test_divisors_of_another_rule_are_refused(name: str, tmp_path: Path) -> None:
    """Long-context models' own divisors, which no rule of Llama 3's gives."""
    head_dim = parse_config(CONFIGS[name]).head_dim
    divisors = np.linspace(1, 3, head_dim // 2, dtype=np.float32) ** 2
    path = checkpoints.write_model_gguf(tmp_path / "x.gguf", CONFIGS[name], rope_freqs__weight=divisors)
    with pytest.raises(CheckpointError, match=r"x\.gguf.*'rope_freqs\.weight'"):
        LLM(path)
