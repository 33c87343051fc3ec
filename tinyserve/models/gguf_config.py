"""The config.json that a GGUF file's metadata imply, in Hugging Face's keys.

Knows llama.cpp's keys for each architecture; what the values mean is config/'s business.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tinyserve.checkpoints.checkpoint import Array
from tinyserve.checkpoints.gguf import GGUFFile, open_gguf
from tinyserve.errors import ConfigError


def config_from_gguf(path: Path) -> dict[str, Any]:
    """The config a GGUF file implies, under Hugging Face's keys; raises ConfigError naming the missing key."""
    return hf_config(open_gguf(path))


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The same for an opened file."""
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    build = _CONFIGS.get(str(architecture))
    if build is None:
        raise ConfigError(
            f"{file.path}: general.architecture {architecture!r} is not supported; tinyserve reads GGUF files of "
            f"{', '.join(_CONFIGS)}."
        )

    def key(name: str, *default: Any) -> Any:
        full = f"{architecture}.{name}"
        if full not in metadata and not default:
            raise ConfigError(f"{file.path} lacks the metadata key {full!r}; convert the model again.")
        return metadata.get(full, *default)

    for name, built in (_BUILT["*"] | _BUILT.get(str(architecture), {})).items():
        if (value := key(name, built)) not in (built, None):
            raise ConfigError(f"{file.path}: {architecture}.{name} is {value!r}, which is not supported; {built!r} is.")
    raw = build(key, file)
    raw["vocab_size"] = key("vocab_size", None) or _vocab_size(file)
    raw["bos_token_id"] = metadata.get("tokenizer.ggml.bos_token_id")
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    raw["eos_token_id"] = sorted({end for end in ends if end is not None})
    raw["tie_word_embeddings"] = "output.weight" not in file.tensors
    return raw


# Keys that turn a known architecture into one that is not built, and their values where it is.
_BUILT = {
    "*": {"attention.causal": True, "pooling_type": 0},
    "llama": {"expert_count": 0},  # Mixtral
}


def _rope_scaling(key: Callable[..., Any], file: GGUFFile) -> dict[str, Any]:
    """RoPE's base, and how it is stretched; raises ConfigError for a way that is not built."""
    architecture, scaling = file.metadata["general.architecture"], key("rope.scaling.type", "none")
    rope = {"rope_type": "default", "rope_theta": key("rope.freq_base", 10000.0)}
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": key("rope.scaling.factor")}
    elif scaling != "none":
        raise ConfigError(
            f"{file.path}: {architecture}.rope.scaling.type {scaling!r} is not supported; none and linear are."
        )
    return rope


def generation_config(file: GGUFFile) -> dict[str, Any]:
    """What the metadata says of sampling, under the keys of generation_config.json."""
    names = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    names["repetition_penalty"] = "penalty_repeat"
    found = {key: file.metadata.get(f"general.sampling.{name}") for key, name in names.items()}
    # Seven digits: 0.6 is kept as the float32 nearest to it.
    raw = {key: float(f"{n:.7g}") if isinstance(n, float) else n for key, n in found.items() if n is not None}
    return raw | {"do_sample": bool(raw.get("temperature"))}


def _vocab_size(file: GGUFFile) -> int:
    vocabulary, embedding = file.metadata.get("tokenizer.ggml.tokens"), file.tensors.tensors.get("token_embd.weight")
    if isinstance(vocabulary, list):
        return len(vocabulary)
    if vocabulary is not None or embedding is None:
        raise ConfigError(
            f"{file.path}: tokenizer.ggml.tokens is {vocabulary!r:.60}, not a vocabulary; convert the model again."
        )
    return embedding.shape[0]


def _gpt2(key: Callable[..., Any], file: GGUFFile) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_layer": key("block_count"),
        "n_embd": key("embedding_length"),
        "n_head": key("attention.head_count"),
        "n_inner": key("feed_forward_length"),
        "n_positions": key("context_length"),
        "layer_norm_epsilon": key("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


def _falcon(key: Callable[..., Any], file: GGUFFile) -> dict[str, Any]:
    kv_heads, two_norms = key("attention.head_count_kv", 1), "blk.0.attn_norm_2.weight" in file.tensors
    _check_rotation(key, file)
    return {
        "model_type": "falcon",
        "num_hidden_layers": key("block_count"),
        "hidden_size": key("embedding_length"),
        "ffn_hidden_size": key("feed_forward_length"),
        "num_attention_heads": key("attention.head_count"),
        "num_kv_heads": kv_heads,
        "max_position_embeddings": key("context_length"),
        "layer_norm_epsilon": key("attention.layer_norm_epsilon"),
        "new_decoder_architecture": two_norms or kv_heads != 1,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "bias": "blk.0.attn_qkv.bias" in file.tensors,
        "rope_parameters": _rope_scaling(key, file),
    }


def _llama(key: Callable[..., Any], file: GGUFFile) -> dict[str, Any]:
    rope = _rope_scaling(key, file)
    if "rope_freqs.weight" in file.tensors:
        # llama.cpp bakes Llama 3's scaling into a tensor of divisors; its extremes give the rule's parameters back.
        rope |= _llama3_scaling(file.tensors["rope_freqs.weight"], key)
    _check_rotation(key, file)
    return {
        "model_type": "llama",
        "num_hidden_layers": key("block_count"),
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"),
        "num_attention_heads": key("attention.head_count"),
        "num_key_value_heads": key("attention.head_count_kv", None),
        "head_dim": key("attention.key_length", None),
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "rope_parameters": rope,
        "attention_bias": _has(file, "attn_q.bias"),
        "mlp_bias": _has(file, "ffn_gate.bias"),
    }


def _check_rotation(key: Callable[..., Any], file: GGUFFile) -> None:
    """Raise ConfigError where only a part of each head is rotated."""
    rotated, width = key("rope.dimension_count", None), key("attention.key_length", None)
    hidden, heads = key("embedding_length"), key("attention.head_count")
    if width is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        width = hidden // heads
    if None not in (rotated, width) and rotated != width:
        raise ConfigError(
            f"{file.path}: {file.metadata['general.architecture']}.rope.dimension_count is {rotated} and a head is "
            f"{width} wide; only the rotation of whole heads is supported."
        )


def _has(file: GGUFFile, part: str) -> bool:
    """Whether any layer has this tensor."""
    return any(name.startswith("blk.") and name.split(".", 2)[2:] == [part] for name in file.tensors)


def _llama3_scaling(divisors: Array, key: Callable[..., Any]) -> dict[str, Any]:
    """Llama 3's rule (low 1, high 4, 8192 positions before stretching) has one free number, the largest divisor."""
    return {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": key("rope.scaling.original_context_length", 8192),
    }


def _granite(key: Callable[..., Any], file: GGUFFile) -> dict[str, Any]:
    """Granite's three architectures: which one a file is told by its own parts, as llama.cpp tells it."""
    raw = _llama(key, file)
    experts, shared = key("expert_count", 0), key("expert_shared_feed_forward_length", 0)
    kv_heads = raw["num_key_value_heads"]
    if isinstance(kv_heads, list):  # one a layer; a layer without is recurrent
        raw["num_key_value_heads"] = max(kv_heads, default=0)
        raw["layer_types"] = ["attention" if heads else "mamba" for heads in kv_heads]
    raw |= {
        "embedding_multiplier": key("embedding_scale", 1.0),
        "attention_multiplier": key("attention.scale"),
        "residual_multiplier": key("residual_scale", 1.0),
        "logits_scaling": key("logit_scale", 1.0),
        "num_local_experts": experts,
        "num_experts_per_tok": key("expert_used_count", 0) if experts else 0,
    }
    rotates = key("rope.scaling.finetuned", True)
    if rotates and "mamba" not in raw.get("layer_types", ()) and not shared:
        return raw | {"model_type": "granitemoe" if experts else "granite"}
    layers = raw["num_hidden_layers"]
    raw |= {
        "model_type": "granitemoehybrid",
        "position_embedding_type": "rope" if rotates else "nope",
        "shared_intermediate_size": shared or raw["intermediate_size"],
        "layer_types": raw.get("layer_types") or ["attention"] * (layers if isinstance(layers, int) else 0),
    }
    return raw | (_mamba2(key, file) if "mamba" in raw["layer_types"] else {})


def _mamba2(key: Callable[..., Any], file: GGUFFile) -> dict[str, Any]:
    inner, heads, hidden = key("ssm.inner_size"), key("ssm.time_step_rank"), key("embedding_length")
    counts = all(isinstance(size, int) and size > 0 for size in (inner, heads, hidden))
    if not counts or inner % heads or inner % hidden:
        raise ConfigError(
            f"{file.path}: ssm.inner_size {inner!r} is not a multiple of ssm.time_step_rank {heads!r} and of "
            f"embedding_length {hidden!r}; convert the model again."
        )
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_expand": inner // hidden,
        "mamba_d_state": key("ssm.state_size"),
        "mamba_d_conv": key("ssm.conv_kernel"),
        "mamba_n_groups": key("ssm.group_count"),
        "mamba_conv_bias": _has(file, "ssm_conv1d.bias"),
        "mamba_proj_bias": _has(file, "ssm_in.bias"),
    }


_CONFIGS: Mapping[str, Callable[[Callable[..., Any], GGUFFile], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "falcon": _falcon,
    "llama": _llama,
    "granite": _granite,
    "granitemoe": _granite,
    "granitehybrid": _granite,
}
