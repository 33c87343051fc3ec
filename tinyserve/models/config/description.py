"""An architecture said in a few words.

Knows configs alone.
"""

from tinyserve.models.config import (
    FalconConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    ModelConfig,
    RopeParameters,
    costs,
)


def architecture(config: ModelConfig) -> dict[str, str]:
    """Say what the architecture is made of, and how a prompt of n tokens costs it."""
    match config:
        case GPT2Config():
            exact = config.activation_function == "gelu"
            position, norm = "learned", "LayerNorm"
            activation, block = "GELU (erf)" if exact else "GELU (tanh)", "sequential"
        case FalconConfig():
            position, norm = _rope(config.rope, otherwise="ALiBi"), "LayerNorm"
            activation, block = "GELU (erf)", "parallel" if config.parallel_attn else "sequential"
            if config.parallel_attn:
                norms = config.num_ln_in_parallel_attn
                block += f", {norms} norm{'s' * (norms > 1)}"
        case LlamaConfig() | GraniteConfig():
            position, norm = _rope(config.rope, otherwise="none (NoPE)"), "RMSNorm"
            activation, block = "SwiGLU", "sequential"
        case _:
            position = norm = activation = block = "not described yet (description.py)"
    return {
        "attention": _attention(config),
        "position": position,
        "norm": norm,
        "activation": activation,
        "block": block + _mixture(config),
        "complexity": _complexity(config),
    }


def sizes(config: ModelConfig) -> dict[str, str]:
    """Say how wide things are, where one number does not: experts, Mamba2; and Granite's constants."""
    words = {"hidden / MLP": f"{config.hidden_size} / {config.intermediate_size}"}
    if not isinstance(config, GraniteConfig):
        return words
    shared = config.shared_intermediate_size
    if config.num_local_experts:
        words["hidden / MLP"] = f"{config.hidden_size} / {config.intermediate_size} in each of "
        words["hidden / MLP"] += f"{config.num_local_experts} experts" + f", {shared} shared" * bool(shared)
    elif shared:
        words["hidden / MLP"] = f"{config.hidden_size} / {shared}"
    if config.num_mamba_layers:
        words["Mamba2"] = f"{config.mamba_n_heads} heads of {config.mamba_d_head}, state {config.mamba_d_state}, "
        words["Mamba2"] += f"convolution {config.mamba_d_conv}, {_plural(config.mamba_n_groups, 'group')}"
    words["multipliers"] = f"embedding {config.embedding_multiplier:g}, attention {config.attention_multiplier:g}, "
    words["multipliers"] += f"residual {config.residual_multiplier:g}, logits 1/{config.logits_scaling:g}"
    return words


def attention_kind(config: ModelConfig) -> str:
    """MHA, GQA or MQA, by how many query heads share one key-value head."""
    if config.num_key_value_heads == config.num_attention_heads:
        return "MHA"
    return "MQA" if config.num_key_value_heads == 1 else "GQA"


def _attention(config: ModelConfig) -> str:
    if not config.num_attention_layers:
        return "none: Mamba2 in every layer"
    heads = f"{config.num_attention_heads}/{config.num_key_value_heads} heads of {config.head_dim}"
    words = f"{attention_kind(config)} {heads}"
    if config.num_mamba_layers:
        words += f" in {_plural(config.num_attention_layers, 'layer')}, Mamba2 in {config.num_mamba_layers}"
    if window := costs.attention_window(config):
        words += f", window {window}"
    return words


def _complexity(config: ModelConfig) -> str:
    """How the work of n tokens grows: attention by pairs of them or by its window, Mamba2 by their number."""
    if not config.num_attention_layers:
        return "O(n)"
    window = costs.attention_window(config)
    attention = f"O(n·{window})" if window else "O(n²)"
    if not config.num_mamba_layers:
        return attention
    return f"{attention} in {_plural(config.num_attention_layers, 'layer')}, O(n) in {config.num_mamba_layers}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _rope(rope: RopeParameters | None, otherwise: str) -> str:
    if rope is None:
        return otherwise
    words = f"RoPE θ={rope.rope_theta:.0f}"
    return words if rope.rope_type == "default" else f"{words}, {rope.rope_type} ×{rope.factor:g}"


def _mixture(config: ModelConfig) -> str:
    if not isinstance(config, GraniteConfig) or not config.num_local_experts:
        return ""
    return f", {config.num_experts_per_tok} of {config.num_local_experts} experts"
