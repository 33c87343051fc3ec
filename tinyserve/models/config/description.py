"""An architecture said in a few words, and the words that several families share.

Knows what all configs answer; what a family's block is made of, its own file tells.
"""

from tinyserve.models.config.base import ModelConfig, RopeParameters


def architecture(config: ModelConfig) -> dict[str, str]:
    """Say what the architecture is made of, and how a prompt of n tokens costs it."""
    return {"attention": _attention(config)} | config.describe()._asdict() | {"complexity": _complexity(config)}


def attention_kind(config: ModelConfig) -> str:
    """MHA, GQA or MQA, by how many query heads share one key-value head."""
    if config.num_key_value_heads == config.num_attention_heads:
        return "MHA"
    return "MQA" if config.num_key_value_heads == 1 else "GQA"


def rope_words(rope: RopeParameters | None, otherwise: str = "") -> str:
    """How positions are told: RoPE's base and stretch, or `otherwise` where nothing is rotated."""
    if rope is None:
        return otherwise
    words = f"RoPE θ={rope.rope_theta:.0f}"
    return words if rope.rope_type == "default" else f"{words}, {rope.rope_type} ×{rope.factor:g}"


def plural(number: int, noun: str) -> str:
    """Write a number of things."""
    return f"{number} {noun}{'s' * (number != 1)}"


def _attention(config: ModelConfig) -> str:
    if not config.num_attention_layers:
        return "none: Mamba2 in every layer"
    heads = f"{config.num_attention_heads}/{config.num_key_value_heads} heads of {config.head_dim}"
    words = f"{attention_kind(config)} {heads}"
    if config.num_mamba_layers:
        words += f" in {plural(config.num_attention_layers, 'layer')}, Mamba2 in {config.num_mamba_layers}"
    if config.attention_window:
        words += f", window {config.attention_window}"
    return words


def _complexity(config: ModelConfig) -> str:
    """How the work of n tokens grows: attention by pairs of them or by its window, Mamba2 by their number."""
    if not config.num_attention_layers:
        return "O(n)"
    attention = f"O(n·{config.attention_window})" if config.attention_window else "O(n²)"
    if not config.num_mamba_layers:
        return attention
    return f"{attention} in {plural(config.num_attention_layers, 'layer')}, O(n) in {config.num_mamba_layers}"
