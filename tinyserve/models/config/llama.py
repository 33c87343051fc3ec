"""Llama's and Mistral's config: RMSNorm, RoPE, SwiGLU and grouped keys; SmolLM2 and TinyLlama are Llamas too.

Knows only keys and values; the forward pass is tinyserve/models/llama.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from tinyserve.models.config.base import (
    ATTENTION,
    ConfigFields,
    DenseConfig,
    Description,
    RopeParameters,
    common_fields,
)
from tinyserve.models.config.description import rope_words
from tinyserve.models.config.gguf import GGUFMetadata
from tinyserve.models.config.shapes import TensorShape, gated_mlp, grouped_attention, rms_norm


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DenseConfig):
    """Llama (Touvron et al., 2023) and Mistral (Jiang et al., 2023), which adds the sliding window."""

    rms_norm_eps: float
    hidden_act: str
    rope: RopeParameters
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None  # a query sees this many positions, itself included; None sees all

    @classmethod
    def parse(cls, fields: ConfigFields, model_type: str) -> Self:
        """Read a Llama or Mistral config.json; defaults are those of transformers' classes."""
        mistral = model_type == "mistral"
        other_layers = set(fields.names("layer_types")) - {ATTENTION, "full_attention"}
        if other_layers:
            fields.refuse(
                f"'layer_types' has {', '.join(sorted(other_layers)):.200}; supported for {model_type}: full_attention."
            )
        # Without the key a Mistral has 8; with null it has one per query head, as has a Llama either way.
        grouped = {"num_key_value_heads": 8} if mistral and "num_key_value_heads" not in fields.raw else {}
        defaults = {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
        common = common_fields(fields, model_type, spellings={}, defaults=defaults | grouped)
        fields.check_rotary(common["head_dim"])
        return cls(
            **common,
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
            hidden_act=fields.choice("hidden_act", ("silu",), default="silu"),
            rope=fields.rope(common["max_position_embeddings"]),
            # Mistral has no biases, whatever its config says.
            attention_bias=not mistral and fields.boolean("attention_bias", default=False),
            mlp_bias=not mistral and fields.boolean("mlp_bias", default=False),
            sliding_window=_sliding_window(fields) if mistral else None,
        )

    @classmethod
    def from_gguf(cls, file: GGUFMetadata) -> dict[str, Any]:
        file.require("expert_count", 0)  # Mixtral
        return file.decoder() | {
            "model_type": "llama",
            "attention_bias": file.layers_have("attn_q.bias"),
            "mlp_bias": file.layers_have("ffn_gate.bias"),
        }

    def backbone_shapes(self) -> Iterator[TensorShape]:
        hidden = self.hidden_size
        yield TensorShape("model.embed_tokens.weight", (self.vocab_size, hidden), "embedding")
        for i in range(self.num_hidden_layers):
            yield from rms_norm(f"model.layers.{i}.input_layernorm", hidden, i)
            yield from grouped_attention(self, i, bias=self.attention_bias, output_bias=self.attention_bias)
            yield from rms_norm(f"model.layers.{i}.post_attention_layernorm", hidden, i)
            yield from gated_mlp(self, i, bias=self.mlp_bias)
        yield from rms_norm("model.norm", hidden)

    @property
    def attention_window(self) -> int | None:
        return self.sliding_window

    def describe(self) -> Description:
        return Description(rope_words(self.rope), "RMSNorm", "SwiGLU", "sequential")


def _sliding_window(fields: ConfigFields) -> int | None:
    """Read Mistral's window: 4096 where the key is absent, as in transformers; null and 0 are off."""
    if "sliding_window" in fields.raw and not fields.raw["sliding_window"]:
        return None
    return int(fields.integer("sliding_window", default=4096))
