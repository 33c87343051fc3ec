"""A checkpoint of transformers as a GGUF file in bfloat16, for llama.cpp: what its convert_hf_to_gguf.py would write.

Knows GPT-2, Falcon-7B, Llama and the Granite hybrid. Without a vocabulary: token ids are all that is ever given to it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from peers import NotMeasured

ARCHITECTURES = {
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "falcon": gguf.MODEL_ARCH.FALCON,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "granitemoehybrid": gguf.MODEL_ARCH.GRANITE_HYBRID,
}
FLOAT32 = ("_norm.", "position_embd", "ssm_conv1d", "ssm_a", "ssm_d", "rope_freqs")


def write(folder: Path, path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        raise NotMeasured(f"{__name__} writes no GGUF file of a {config['model_type']}")
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    _add_sizes(writer, config)
    names = gguf.get_tensor_name_map(architecture, config.get("n_layer") or config["num_hidden_layers"])
    for key, value in _tensors(folder, config):
        name = names.get_name(key, try_suffixes=(".weight", ".bias")) or key
        if value.ndim < 2 or any(part in name for part in FLOAT32):
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, Type.BF16), raw_dtype=Type.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    if config["model_type"] == "gpt2":
        writer.add_context_length(config["n_positions"])
        writer.add_block_count(config["n_layer"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(config["num_attention_heads"])
    if config["model_type"] == "falcon":
        if config["new_decoder_architecture"] or not config["multi_query"] or config["alibi"]:
            raise NotMeasured(f"{__name__} writes no Falcon but those like falcon-7b")
        writer.add_tensor_data_layout("jploski")
        writer.add_feed_forward_length(config.get("ffn_hidden_size") or 4 * config["hidden_size"])
        writer.add_head_count_kv(1)
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    if config["model_type"] == "llama":
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(_head_dim(config))
        writer.add_value_length(_head_dim(config))
        return
    if config["num_local_experts"]:
        raise NotMeasured(f"{__name__} writes no mixture of experts")
    is_attention = ["attention" in kind for kind in config["layer_types"]]
    writer.add_feed_forward_length(config["shared_intermediate_size"])
    writer.add_head_count_kv([config["num_key_value_heads"] * is_ for is_ in is_attention])
    writer.add_rope_scaling_finetuned(config["position_embedding_type"] == "rope")
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])
    writer.add_ssm_conv_kernel(config["mamba_d_conv"])
    writer.add_ssm_state_size(config["mamba_d_state"])
    writer.add_ssm_group_count(config["mamba_n_groups"])
    writer.add_ssm_inner_size(config["mamba_expand"] * config["hidden_size"])
    writer.add_ssm_time_step_rank(config["mamba_n_heads"])


def _tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor in float32, turned as llama.cpp wants it, under names that gguf's map knows."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  it is no dict
                yield from _turn(key, tensors.get_tensor(key).float().numpy(), config)
    if config["model_type"] == "llama" and _rope(config).get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(config)


def _turn(key: str, value: np.ndarray, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    part = key.split(".", 3)[-1]
    if part in ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"):
        yield key, np.ascontiguousarray(value.T)  # Conv1D
    elif part in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
        heads = config["num_attention_heads" if "q_proj" in part else "num_key_value_heads"]
        halves = value.reshape(heads, 2, -1, value.shape[1])  # the two halves of each head's rows, interleaved
        yield key, np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
    elif part == "shared_mlp.input_linear.weight":
        gate, up = np.split(value, 2)
        layer = key.split(".")[2]
        yield f"blk.{layer}.ffn_gate.weight", gate
        yield f"blk.{layer}.ffn_up.weight", up
    elif part == "shared_mlp.output_linear.weight":
        yield f"blk.{key.split('.')[2]}.ffn_down.weight", value
    elif part == "mamba.A_log":
        yield key, -np.exp(value)[:, None]
    elif part == "mamba.D":
        yield key, value[:, None]
    elif part == "mamba.dt_bias":
        yield key.replace("dt_bias", "dt_proj.bias"), value
    elif part == "mamba.conv1d.weight":
        yield key, value[:, 0]
    elif part == "mamba.norm.weight":
        yield key, value.reshape(config["mamba_n_groups"], -1)
    else:
        yield key, value


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("rope_parameters") or {"rope_theta": config["rope_theta"], **(config["rope_scaling"] or {})}


def _llama3_factors(config: dict[str, Any]) -> np.ndarray:
    """By how much each frequency is divided: llama.cpp's rope_freqs, from transformers' "llama3" scaling."""
    rope, size = _rope(config), _head_dim(config)
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = smooth.clip(0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
