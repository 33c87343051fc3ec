"""What a config implies, as plain data for `inspect-config` and for the server's page. No weights are read."""

from typing import Any

from tinyserve.checkpoints.model_ref import ModelRef
from tinyserve.models.config import ModelConfig, costs
from tinyserve.models.config.description import architecture, attention_kind
from tinyserve.models.dtypes import KV_CACHE_DTYPES, REPORTED, resolve_kv_cache_dtype

DEFAULT_BANDWIDTH = 40.0  # GB/s: what a desktop with two channels of DDR4 or DDR5 reads
DEFAULT_CONTEXT = 1024


def inspection(
    config: ModelConfig,
    ref: ModelRef,
    source: str,
    bandwidth: float = DEFAULT_BANDWIDTH,
    context: int = DEFAULT_CONTEXT,
) -> dict[str, Any]:
    """Everything that can be said of a model by its config alone; sizes are bytes, bandwidth is GB/s."""
    preset = ref.preset
    context = min(context, config.max_position_embeddings)
    parameters = costs.parameter_count(config)
    kv = {dtype: costs.kv_bytes_per_token(config, dtype) for dtype in KV_CACHE_DTYPES}
    state = costs.state_bytes_per_sequence(config)
    # A decoded token reads the weights and the cache once, and both reads and writes the recurrent state. The cache is
    # kept as it is by default: in bfloat16, but for float32 weights.
    seen = min(context, config.attention_window or context)
    read = {
        dtype: costs.weight_bytes_per_token(config, dtype)
        + seen * kv[resolve_kv_cache_dtype("auto", dtype)]
        + 2 * state
        for dtype in REPORTED
    }
    return {
        "model": ref.name,
        "source": source,
        "repo": preset.repo if preset else None,
        "revision": preset.revision if preset else None,
        "license": preset.license if preset else None,
        "gated": preset.gated if preset else None,
        "unverified": list(preset.unverified) if preset else [],
        "model_type": config.model_type,
        "architecture": architecture(config),
        "sizes": config.sizes(),
        "attention_kind": attention_kind(config),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_window": config.attention_window,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": list(config.eos_token_ids),
        "layer_types": list(config.layer_types),
        "parameters": parameters,
        "active_parameters": costs.active_parameter_count(config),
        "parameters_by_component": costs.parameters_by_component(config),
        "weight_bytes": {dtype: costs.weight_bytes(config, dtype) for dtype in REPORTED},
        "kv_bytes_per_token": kv,
        "kv_bytes_full_context": {dtype: n * config.max_position_embeddings for dtype, n in kv.items()},
        "state_bytes_per_sequence": state,
        "flops_per_token": costs.matmul_flops_per_token(config),
        "attention_flops_per_position": costs.attention_flops_per_position(config),
        "roofline": {
            "bandwidth_gb_per_s": bandwidth,
            "context": context,
            "bytes_per_token": read,
            "tokens_per_second": {dtype: round(bandwidth * 1e9 / n, 2) for dtype, n in read.items()},
        },
    }
