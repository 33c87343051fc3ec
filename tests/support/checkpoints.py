"""Tiny checkpoints with odd sizes, as folders and as GGUF files: a recipe in integers, so they are the same anywhere.

Knows the names of files and tensors; nothing here computes a forward pass.
"""

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyserve.models.config import parse_config
from tinyserve.text.tokenizer.detokenizer import byte_of_character

Array = np.ndarray

# The vocabulary: token b is byte b, then come two merges and three special tokens.
MERGES = [("t", "h"), ("th", "e")]
PIECES = sorted(byte_of_character(), key=byte_of_character().__getitem__) + ["".join(merge) for merge in MERGES]
BOS, EOS, USER = 258, 259, 260
SPECIAL = {"<|bos|>": BOS, "<|eos|>": EOS, "<|user|>": USER}
VOCAB = 261
CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}\n{% endfor %}"

_GPT2 = {
    "model_type": "gpt2", "vocab_size": VOCAB, "n_positions": 128, "n_embd": 120, "n_layer": 3, "n_head": 5,
    "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
_LLAMA = {
    "model_type": "llama", "vocab_size": VOCAB, "max_position_embeddings": 128, "hidden_size": 120,
    "num_hidden_layers": 3, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 157,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
_GROUPED = {"hidden_size": 144, "num_attention_heads": 6, "num_key_value_heads": 2}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_QWEN2, _QWEN3 = _LLAMA | {"model_type": "qwen2"}, _LLAMA | {"model_type": "qwen3", "head_dim": 24}
_GRANITE = _LLAMA | {
    "model_type": "granite", "embedding_multiplier": 6.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5,
    "logits_scaling": 3.0,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 77}
_HYBRID = _GRANITE | {
    "model_type": "granitemoehybrid", "tie_word_embeddings": True, "num_local_experts": 0, "num_experts_per_tok": 0,
    "shared_intermediate_size": 157, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mamba_n_heads": 10, "mamba_d_head": 24, "mamba_d_state": 16, "mamba_d_conv": 3, "mamba_n_groups": 2,
}  # fmt: skip

_FALCON = {
    "model_type": "falcon", "vocab_size": VOCAB, "max_position_embeddings": 128, "hidden_size": 120,
    "num_hidden_layers": 3, "num_attention_heads": 5, "num_kv_heads": 5, "ffn_hidden_size": 157,
    "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False, "alibi": False,
    "bos_token_id": BOS, "eos_token_id": EOS,
}  # fmt: skip
_FALCON_GROUPED = {
    "hidden_size": 144, "num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True,
}  # fmt: skip
_FALCON_RW = {"multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}

# "bare" is no key of transformers: the checkpoint has no head, and no "transformer." before its names.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gpt2-bare": _GPT2 | {"bare": True, "n_inner": 77, "activation_function": "gelu"},
    "gpt2-by-layer": _GPT2 | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 301},
    "gpt2-untied": _GPT2 | {"scale_attn_weights": False, "tie_word_embeddings": False},
    "llama": _LLAMA,
    "llama-grouped": _LLAMA | _GROUPED | {"tie_word_embeddings": True},
    "llama-head-dim": _LLAMA | {"hidden_size": 100, "num_key_value_heads": 1, "head_dim": 24},
    "llama-3": _LLAMA | _GROUPED | {"rope_parameters": _LLAMA3},
    "llama-linear": _LLAMA | {"rope_parameters": _LINEAR},
    "llama-biases": _LLAMA | _GROUPED | {"attention_bias": True, "mlp_bias": True},
    "mistral": _LLAMA | _GROUPED | {"model_type": "mistral", "sliding_window": 5},
    "qwen2": _QWEN2 | _GROUPED,
    "qwen2-tied": _QWEN2 | {"tie_word_embeddings": True, "attention_bias": False},
    "qwen2-window": _QWEN2 | {
        "num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0,
    },
    "qwen3": _QWEN3 | _GROUPED | {"tie_word_embeddings": True},
    "qwen3-head-dim": _QWEN3 | {"hidden_size": 100, "num_key_value_heads": 1, "rope_parameters": _LINEAR},
    "qwen3-biases": _QWEN3 | _GROUPED | {"attention_bias": True, "head_dim": 40},
    "granite": _GRANITE,
    "granite-grouped": _GRANITE | _GROUPED | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "granite-moe": _GRANITE | _EXPERTS | {"model_type": "granitemoe"},
    "granite-hybrid": _HYBRID,
    "granite-hybrid-moe": _HYBRID
    | _EXPERTS
    | {"shared_intermediate_size": 61, "layer_types": ["full_attention", "linear_attention", "linear_attention"]},
    "granite-hybrid-rope": _HYBRID
    | {"position_embedding_type": "rope", "num_key_value_heads": 1, "attention_bias": True, "mamba_proj_bias": True}
    | {"mamba_conv_bias": False, "mamba_n_groups": 1, "mamba_d_conv": 4, "time_step_limit": [0.25, 1.0]},
    "falcon-7b": _FALCON,
    "falcon-40b": _FALCON | _FALCON_GROUPED,
    "falcon-11b": _FALCON | _FALCON_GROUPED | {
        "num_ln_in_parallel_attn": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 500042.0},
    },
    "falcon-rw": _FALCON | _FALCON_RW,
    "falcon-bare": _FALCON | {"bare": True, "bias": True, "parallel_attn": False},
    "falcon-untied": _FALCON | {"multi_query": False, "tie_word_embeddings": False, "rope_parameters": _LINEAR},
    "falcon-alibi-grouped": _FALCON | _FALCON_GROUPED | {"alibi": True, "bias": True},
}  # fmt: skip


def tensor(name: str, shape: tuple[int, ...]) -> Array:
    """The weights of this name: multiples of 1/4096 that float16 holds exactly, from the bits of PCG64."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    uniform = ((np.asarray(raw) >> np.uint64(54)).astype(np.float32) - 512) / 512  # [-1, 1)
    if "norm" in name or "ln_" in name:
        values = uniform / 2 + name.endswith("weight")
    elif "wte" in name or "embed" in name:
        values = uniform
    else:
        values = uniform / 4
    return values.astype(np.float32).reshape(shape)


def tensors_of(raw: Mapping[str, Any]) -> dict[str, Array]:
    """Every tensor that this config implies, under Hugging Face's names."""
    return {t.name: tensor(t.name, t.shape) for t in parse_config(raw).tensor_shapes()}


def token_ids(count: int, seed: int = 0) -> list[int]:
    """Ids from the whole vocabulary, special tokens among them."""
    return [int(raw % VOCAB) for raw in np.random.PCG64(seed).random_raw(count)]


def write_folder(folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Array] | None = None) -> Path:
    """A checkpoint's folder, written without transformers."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(dict(tensors_of(raw) if tensors is None else tensors), folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of the vocabulary, with a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(PIECES)}, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


# --- with torch and transformers ----------------------------------------------------------------------------------

# Granite's experts, as transformers has them in memory and in files.
_SAVED_AS = {
    "block_sparse_moe.router.weight": "block_sparse_moe.router.layer.weight",
    "block_sparse_moe.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
    "block_sparse_moe.experts.down_proj": "block_sparse_moe.output_linear.weight",
}


def transformers_model(raw: Mapping[str, Any]) -> Any:
    """transformers' own model of this config, with the recipe's weights."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    keys = {key: value for key, value in raw.items() if key not in ("model_type", "bare")}
    config = AutoConfig.for_model(raw["model_type"], **keys)
    model = (AutoModel if raw.get("bare") else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for here, saved in _SAVED_AS.items():
                name = name.replace(here, saved)
            parameter.copy_(torch.from_numpy(tensor(name, tuple(parameter.shape))))
    return model.eval()


def save_with_transformers(folder: Path, raw: Mapping[str, Any], dtype: str = "float32", **options: Any) -> Path:
    """A checkpoint's folder, saved by transformers in `dtype`; options go to save_pretrained."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    transformers_model(raw).to(getattr(torch, dtype)).save_pretrained(folder, **options)
    write_tokenizer(folder)
    return folder


def transformers_logits(folder: Path, ids: list[int], **options: Any) -> Array:
    """What transformers computes in float32 from a folder: (tokens, vocab); options go to from_pretrained."""
    import torch
    from transformers import AutoModelForCausalLM

    # Experts one by one, as torch's grouped product takes no rows of odd sizes.
    options = {"experts_implementation": "eager"} | options
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        logits: Array = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def error(got: Array, expected: Array) -> float:
    """The largest difference, as a share of the largest logit expected."""
    assert got.shape == expected.shape
    assert got.dtype == np.float32
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# --- GGUF ---------------------------------------------------------------------------------------------------------

_GGUF_NAMES = {
    "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "ln_1": "attn_norm", "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mamba.in_proj": "ssm_in", "mamba.conv1d": "ssm_conv1d",
    "mamba.norm": "ssm_norm", "mamba.out_proj": "ssm_out", "block_sparse_moe.router.layer": "ffn_gate_inp",
    "block_sparse_moe.output_linear": "ffn_down_exps",
    "word_embeddings": "token_embd", "ln_mlp": "attn_norm",
    "ln_attn": "attn_norm_2", "self_attention.query_key_value": "attn_qkv", "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
}  # fmt: skip


def gguf_architecture(raw: Mapping[str, Any]) -> str:
    """What llama.cpp calls it: a hybrid without Mamba layers is none."""
    if raw["model_type"] != "granitemoehybrid":
        return str(raw["model_type"])
    if "linear_attention" in raw["layer_types"]:
        return "granitehybrid"
    return "granitemoe" if raw["num_local_experts"] else "granite"


def _granite_tensors(name: str, value: Array, raw: Mapping[str, Any]) -> dict[str, Array]:
    """GraniteHybridModel.modify_tensors of llama.cpp: what it takes apart or gives another shape."""
    _, _, layer, part, kind = name.split(".", 4)
    block, suffix = f"blk.{layer}", "_shexp" if raw.get("num_local_experts") else ""
    match part, kind:
        case "shared_mlp", "input_linear.weight":
            gate, up = np.split(value, 2)
            return {f"{block}.ffn_gate{suffix}.weight": gate, f"{block}.ffn_up{suffix}.weight": up}
        case "shared_mlp", "output_linear.weight":
            return {f"{block}.ffn_down{suffix}.weight": value}
        case "block_sparse_moe", "input_linear.weight":
            gate, up = np.split(value, 2, axis=1)
            return {f"{block}.ffn_gate_exps.weight": gate, f"{block}.ffn_up_exps.weight": up}
        case "mamba", "A_log":
            return {f"{block}.ssm_a": -np.exp(value)[:, None]}
        case "mamba", "D":
            return {f"{block}.ssm_d": value[:, None]}
        case "mamba", "dt_bias":
            return {f"{block}.ssm_dt.bias": value}
        case "mamba", "conv1d.weight":
            return {f"{block}.ssm_conv1d.weight": value[:, 0]}
        case "mamba", "norm.weight":
            return {f"{block}.ssm_norm.weight": value.reshape(raw["mamba_n_groups"], -1)}
    return {}


def gguf_tensors(raw: Mapping[str, Any]) -> dict[str, Array]:
    """The same weights as llama.cpp's convert_hf_to_gguf.py names and turns them."""
    converted = {}
    for name, value in tensors_of(raw).items():
        if name.startswith("model.layers.") and (parts := _granite_tensors(name, value, raw)):
            converted |= {part: np.ascontiguousarray(array) for part, array in parts.items()}
            continue
        stem, kind = name.removeprefix("model.").removeprefix("transformer.").rsplit(".", 1)
        match stem.split(".", 2):
            case ["h" | "layers", layer, part]:
                new_name = f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"
            case _:
                part, new_name = stem, f"{_GGUF_NAMES[stem]}.{kind}"
        if part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj") and value.ndim == 2:
            value = value.T  # Conv1D
        if part in ("self_attn.q_proj", "self_attn.k_proj") and not raw["model_type"].startswith("qwen"):
            heads = raw["num_attention_heads" if part.endswith("q_proj") else "num_key_value_heads"]
            value = permute(value, heads)
        if part == "self_attention.query_key_value":
            value = queries_keys_values(value, parse_config(raw).num_key_value_heads, raw["num_attention_heads"])
        converted[new_name] = np.ascontiguousarray(value)
    return converted


def permute(weight: Array, heads: int) -> Array:
    """LlamaModel.permute of llama.cpp: the two halves of each head's rows, interleaved."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def queries_keys_values(fused: Array, kv_heads: int, heads: int) -> Array:
    """FalconModel.modify_tensors of llama.cpp: each group's queries, key and value, sorted by kind."""
    groups = fused.reshape(kv_heads, heads // kv_heads + 2, -1, *fused.shape[1:])
    kinds = np.split(groups, [heads // kv_heads, heads // kv_heads + 1], axis=1)
    return np.concatenate([kind.reshape(-1, *fused.shape[1:]) for kind in kinds])


def gguf_metadata(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of this config and of the vocabulary."""
    if raw["model_type"] == "gpt2":
        sizes = {
            "block_count": raw["n_layer"],
            "embedding_length": raw["n_embd"],
            "attention.head_count": raw["n_head"],
            "feed_forward_length": raw.get("n_inner") or 4 * raw["n_embd"],
            "context_length": raw["n_positions"],
            "attention.layer_norm_epsilon": 1e-5,
        }
    elif raw["model_type"] == "falcon":
        sizes = {
            "block_count": raw["num_hidden_layers"],
            "embedding_length": raw["hidden_size"],
            "attention.head_count": raw["num_attention_heads"],
            "attention.head_count_kv": parse_config(raw).num_key_value_heads,
            "feed_forward_length": raw["ffn_hidden_size"],
            "context_length": raw["max_position_embeddings"],
            "attention.layer_norm_epsilon": 1e-5,
            "rope.freq_base": raw.get("rope_parameters", {}).get("rope_theta", 10000.0),
        }
    else:
        rope = raw.get("rope_parameters", {})
        sizes = {
            "block_count": raw["num_hidden_layers"],
            "embedding_length": raw["hidden_size"],
            "attention.head_count": raw["num_attention_heads"],
            "attention.head_count_kv": raw["num_key_value_heads"],
            "feed_forward_length": raw["intermediate_size"],
            "context_length": raw["max_position_embeddings"],
            "attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
            "rope.freq_base": rope.get("rope_theta", 10000.0),
        }
        if "head_dim" in raw:
            sizes |= dict.fromkeys(("attention.key_length", "attention.value_length"), raw["head_dim"])
            sizes["rope.dimension_count"] = raw["head_dim"]
        if rope.get("rope_type") == "linear":
            sizes |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
        if "logits_scaling" in raw:
            sizes |= _granite_sizes(raw)
    return {f"{gguf_architecture(raw)}.{key}": value for key, value in sizes.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*PIECES, *SPECIAL],
        "tokenizer.ggml.token_type": [1] * len(PIECES) + [3] * len(SPECIAL),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in MERGES],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _granite_sizes(raw: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {
        "attention.scale": raw["attention_multiplier"],
        "embedding_scale": raw["embedding_multiplier"],
        "residual_scale": raw["residual_multiplier"],
        "logit_scale": raw["logits_scaling"],
    }
    if "num_local_experts" in raw:
        sizes |= {"expert_count": raw["num_local_experts"], "expert_used_count": raw["num_experts_per_tok"]}
    if "shared_intermediate_size" in raw:
        sizes["expert_shared_feed_forward_length"] = raw["shared_intermediate_size"]
    if raw["model_type"] != "granitemoehybrid":
        return sizes
    if not raw["num_local_experts"]:
        sizes["feed_forward_length"] = raw["shared_intermediate_size"]
    kinds = raw["layer_types"]
    sizes["attention.head_count_kv"] = [raw["num_key_value_heads"] * (kind == "full_attention") for kind in kinds]
    sizes["rope.scaling.finetuned"] = raw.get("position_embedding_type") == "rope"
    if "linear_attention" in kinds:
        sizes |= {
            "ssm.conv_kernel": raw["mamba_d_conv"],
            "ssm.state_size": raw["mamba_d_state"],
            "ssm.group_count": raw["mamba_n_groups"],
            "ssm.inner_size": raw["mamba_n_heads"] * raw["mamba_d_head"],
            "ssm.time_step_rank": raw["mamba_n_heads"],
        }
    return sizes


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Array],
    types: Mapping[str, Any] | None = None,
) -> Path:
    """A GGUF file by gguf's own writer. A tensor whose type is in `types` is handed over as that type's raw bytes."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model_gguf(path: Path, raw: Mapping[str, Any], **extra_tensors: Array) -> Path:
    """The GGUF twin of `write_folder`."""
    tensors = gguf_tensors(raw) | {name.replace("__", "."): value for name, value in extra_tensors.items()}
    return write_gguf(path, gguf_architecture(raw), gguf_metadata(raw), tensors)
