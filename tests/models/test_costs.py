"""Names, shapes and sizes: transformers' own checkpoints are the measure, and published sizes the check."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from oracles import Oracle

from tinyserve.checkpoints import presets
from tinyserve.errors import UserError
from tinyserve.models.config import costs, parse_config, preset_config
from tinyserve.models.config.granite import GraniteConfig
from tinyserve.models.config.shapes import TensorShape
from tinyserve.models.dtypes import REPORTED

pytestmark = pytest.mark.fast

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MAMBA = {
    "shared_intermediate_size": 40,
    "layer_types": ["linear_attention", "full_attention"],
    "mamba_n_heads": 8,
    "mamba_d_head": "auto",
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
}
FALCON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt2-inner": (
        "gpt2",
        {"vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "n_inner": 40},
    ),
    "gpt2-untied": (
        "gpt2",
        {
            "vocab_size": 96,
            "n_embd": 32,
            "n_layer": 1,
            "n_head": 4,
            "n_positions": 64,
            "tie_word_embeddings": False,
        },
    ),
    "llama": ("llama", LLAMA),
    "llama-tied": ("llama", LLAMA | {"tie_word_embeddings": True, "head_dim": 16}),
    "llama-bias": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", LLAMA),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-window": ("qwen2", LLAMA | {"use_sliding_window": True, "max_window_layers": 0}),
    "qwen2-all-heads": ("qwen2", LLAMA | {"num_key_value_heads": None, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", LLAMA),
    "qwen3-bias": ("qwen3", LLAMA | {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": True}),
    "falcon-7b": ("falcon", FALCON),
    "falcon-40b": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "falcon",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-rw": (
        "falcon",
        FALCON | {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True},
    ),
    "granite": ("granite", LLAMA | {"mlp_bias": True}),
    "granitemoe": ("granitemoe", LLAMA | {"num_local_experts": 4, "tie_word_embeddings": True}),
    "hybrid": ("granitemoehybrid", LLAMA | MAMBA | {"num_local_experts": 0, "tie_word_embeddings": True}),
    "hybrid-moe": ("granitemoehybrid", LLAMA | MAMBA | {"num_local_experts": 4}),
    "hybrid-bias": (
        "granitemoehybrid",
        LLAMA | MAMBA | {"num_local_experts": 0, "mamba_proj_bias": True, "mamba_conv_bias": False},
    ),
}
# What the checkpoints of the presets hold, where it has been published to the parameter.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "llama-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "granite-350m": 340_332_224,
}


def saved_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes from the header of a .safetensors file."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("case", TINY)
def test_names_shapes_and_defaults_are_those_of_transformers(case: str, tmp_path: Path, oracle: Oracle) -> None:
    """A saved checkpoint and its config.json, read back, agree tensor by tensor and default by default."""
    oracle("torch")
    transformers = oracle("transformers")
    model_type, sizes = TINY[case]
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    saved = saved_shapes(tmp_path / "model.safetensors")
    if model_type == "gpt2":  # a fine-tune has the prefix, openai-community/gpt2 has not
        saved = {name.removeprefix("transformer."): shape for name, shape in saved.items()}
    written = parse_config(json.loads((tmp_path / "config.json").read_text()))
    assert {tensor.name: tensor.shape for tensor in written.tensor_shapes()} == saved
    # transformers writes every key, so an absent key means here what it means there.
    assert parse_config({"model_type": model_type, **sizes}) == written


@pytest.mark.parametrize("name", presets.names())
def test_presets_have_as_many_parameters_as_in_transformers(name: str, oracle: Oracle) -> None:
    """At their full sizes: on torch's meta device a model of 41 billion parameters takes no memory."""
    torch = oracle("torch")
    transformers = oracle("transformers")
    preset = presets.get(name)
    raw = dict(preset.raw_config)
    if isinstance(preset_config(preset.name), GraniteConfig) and preset_config(preset.name).num_mamba_layers:
        raw["time_step_limit"] = preset_config(
            preset.name
        ).time_step_limit  # whose infinity transformers does not read as written
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert costs.parameter_count(preset_config(preset.name)) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(("name", "parameters"), list(PUBLISHED.items()))
def test_presets_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    config = preset_config(name)
    assert costs.parameter_count(config) == parameters
    assert sum(costs.parameters_by_component(config).values()) == parameters


@pytest.mark.parametrize("name", presets.names())
def test_every_tensor_has_one_name_and_a_known_component(name: str) -> None:
    config = preset_config(name)
    tensors = list(config.tensor_shapes())
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    assert {tensor.component for tensor in tensors} <= set(costs.COMPONENTS)
    layers = {tensor.layer for tensor in tensors if tensor.layer is not None}
    assert layers == set(range(config.num_hidden_layers))


def test_fused_falcon_rows() -> None:
    """The fused QKV of the three layouts: (71+2)·64, 8·(16+2)·64 and 32·3·64 rows."""
    for name, rows in (("falcon-7b", 4672), ("falcon-40b", 9216), ("falcon-rw-1b", 6144)):
        tensors = preset_config(name).tensor_shapes()
        fused = next(tensor for tensor in tensors if tensor.name.endswith("query_key_value.weight"))
        assert fused.shape[0] == rows


def test_state_and_cache_of_the_hybrids() -> None:
    small, large = preset_config("granite-350m"), preset_config("granite-1b")
    assert costs.state_bytes_per_sequence(small) == 28 * 4 * (48 * 32 * 128 + 1792 * 3)
    assert round(costs.state_bytes_per_sequence(small) / 1e6, 1) == 22.6
    assert round(costs.state_bytes_per_sequence(large) / 1e6) == 58
    assert costs.kv_bytes_per_token(small) == 4 * 2 * 4 * 64 * 4
    tokens = costs.state_bytes_per_sequence(small) / costs.kv_bytes_per_token(small)
    assert round(tokens, -2) == 2800
    assert costs.state_bytes_per_sequence(preset_config("gpt2")) == 0


def test_grouped_heads_shrink_the_cache() -> None:
    """Llama 2 keeps every head's keys; Llama 3 keeps a quarter of them, in half the bytes as bfloat16."""
    assert costs.kv_bytes_per_token(preset_config("llama-7b")) == 2 * 32 * 32 * 128 * 4
    assert costs.kv_bytes_per_token(preset_config("llama-3.1-8b")) == 2 * 32 * 8 * 128 * 4
    assert costs.kv_bytes_per_token(preset_config("llama-3.1-8b"), "bfloat16") == 2 * 32 * 8 * 128 * 2


def test_bytes_of_one_matrix_by_dtype() -> None:
    matrix = TensorShape("x.weight", (10, 100), "mlp", 0)
    assert costs.tensor_bytes(matrix, "float32") == 4000
    assert costs.tensor_bytes(matrix, "bfloat16") == 2000
    assert costs.tensor_bytes(matrix, "int8") == 10 * (100 + 2 * 2)  # two groups of up to 64
    assert costs.tensor_bytes(matrix, "int4") == 10 * (50 + 4 * 2)  # four groups of up to 32
    head = TensorShape("lm_head.weight", (10, 100), "head")
    assert costs.tensor_bytes(head, "int4") == costs.tensor_bytes(head, "int8")
    conv1d = TensorShape("c_fc.weight", (100, 10), "mlp", 0, in_axis=0)
    assert costs.tensor_bytes(conv1d, "int8") == costs.tensor_bytes(matrix, "int8")
    for small in ("float32", "bfloat16", "int8", "int4"):
        norm = TensorShape("norm.weight", (100,), "norm")
        assert costs.tensor_bytes(norm, small) == 400


@pytest.mark.parametrize("name", presets.names())
def test_fewer_bits_are_fewer_bytes(name: str) -> None:
    config = preset_config(name)
    sizes = [costs.weight_bytes(config, dtype) for dtype in REPORTED]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 4 * costs.parameter_count(config)
    reads = [costs.weight_bytes_per_token(config, dtype) for dtype in REPORTED]
    assert all(read <= size for read, size in zip(reads, sizes, strict=True))


def test_a_mixture_reads_the_experts_it_chooses() -> None:
    config = preset_config("granite-4.0-h-tiny")
    experts = costs.parameters_by_component(config)["experts"]
    idle = experts * 58 // 64
    assert costs.active_parameter_count(config) == costs.parameter_count(config) - idle
    assert costs.weight_bytes_per_token(config, "float32") == 4 * costs.active_parameter_count(config)


def test_an_untied_embedding_is_read_by_the_row() -> None:
    config = preset_config("tinyllama-1.1b")
    embedding = config.vocab_size * config.hidden_size
    read = costs.weight_bytes_per_token(config, "float32")
    assert read == 4 * (costs.parameter_count(config) - embedding + config.hidden_size)


def test_work_per_token_is_two_operations_per_weight() -> None:
    config = preset_config("smollm2-135m")
    matrices = sum(tensor.size for tensor in config.tensor_shapes() if tensor.is_matrix)
    assert costs.matmul_flops_per_token(config) == 2 * matrices
    assert costs.attention_flops_per_position(config) == 4 * 30 * 9 * 64


def test_unknown_dtypes_are_refused_with_the_known() -> None:
    config = preset_config("gpt2")
    with pytest.raises(UserError, match=r"'int3'.*float32, bfloat16, w8a16, .*int8"):
        costs.weight_bytes(config, "int3")
    with pytest.raises(UserError, match=r"'float16'.*float32, bfloat16, int8"):
        costs.kv_bytes_per_token(config, "float16")
