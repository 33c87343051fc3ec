"""Llama's and Mistral's config: RMSNorm, RoPE, SwiGLU and grouped keys; SmolLM2 and TinyLlama are Llamas too.

Knows only keys and values; the forward pass is tinyserve/models/llama.py.
"""

from dataclasses import dataclass
from typing import Self

from tinyserve.models.config.base import ATTENTION, Fields, ModelConfig, RopeParameters


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Llama (Touvron et al., 2023) and Mistral (Jiang et al., 2023), which adds the sliding window."""

    rms_norm_eps: float
    hidden_act: str
    rope: RopeParameters
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None  # a query sees this many positions, itself included; None sees all

    @classmethod
    def parse(cls, fields: Fields, model_type: str) -> Self:
        """Read a Llama or Mistral config.json; defaults are those of transformers' classes."""
        mistral = model_type == "mistral"
        hidden_size = fields.integer("hidden_size")
        heads = fields.integer("num_attention_heads")
        # Without the key a Mistral has 8; with null it has one per query head, as has a Llama either way.
        grouped = mistral and "num_key_value_heads" not in fields.raw
        kv_heads = fields.integer("num_key_value_heads", default=8 if grouped else heads)
        positions = fields.integer("max_position_embeddings")
        layers = fields.integer("num_hidden_layers")
        other_layers = set(fields.names("layer_types")) - {ATTENTION, "full_attention"}
        if other_layers:
            fields.refuse(
                f"'layer_types' has {', '.join(sorted(other_layers))}; supported for {model_type}: full_attention."
            )
        head_dim = fields.heads(hidden_size, heads, kv_heads)
        fields.check_rotary(head_dim)
        return cls(
            model_type=model_type,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=fields.integer("intermediate_size"),
            max_position_embeddings=positions,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
            bos_token_id=fields.token_id("bos_token_id", default=1),
            eos_token_ids=fields.token_ids("eos_token_id", default=2),
            layer_types=(ATTENTION,) * layers,
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
            hidden_act=fields.choice("hidden_act", ("silu",), default="silu"),
            rope=fields.rope(positions),
            # Mistral has no biases, whatever its config says.
            attention_bias=not mistral and fields.boolean("attention_bias", default=False),
            mlp_bias=not mistral and fields.boolean("mlp_bias", default=False),
            sliding_window=_sliding_window(fields) if mistral else None,
        )


def _sliding_window(fields: Fields) -> int | None:
    """Read Mistral's window: 4096 where the key is absent, as in transformers; null and 0 are off."""
    if "sliding_window" in fields.raw and not fields.raw["sliding_window"]:
        return None
    return int(fields.integer("sliding_window", default=4096))
