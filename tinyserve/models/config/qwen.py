"""Qwen2's and Qwen3's config: a Llama with biases on queries, keys and values, or with norms on queries and keys.

Knows only keys and values; the forward pass is tinyserve/models/qwen.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from tinyserve.models.config.base import ConfigFields, DenseConfig, Description, RopeParameters, common_fields
from tinyserve.models.config.description import rope_words
from tinyserve.models.config.gguf import GGUFMetadata
from tinyserve.models.config.shapes import TensorShape, gated_mlp, grouped_attention, rms_norm


@dataclass(frozen=True, kw_only=True)
class QwenConfig(DenseConfig):
    """Qwen2 and 2.5 (Yang et al., 2024) and the dense Qwen3 (Yang et al., 2025)."""

    rms_norm_eps: float
    hidden_act: str
    rope: RopeParameters
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool  # an RMSNorm of each query head and each key head, before they are rotated
    sliding_window: int | None  # a query sees this many positions, itself included; None sees all

    @classmethod
    def parse(cls, fields: ConfigFields, model_type: str) -> Self:
        """Read a Qwen2 or Qwen3 config.json; defaults are those of transformers' classes."""
        qwen3 = model_type == "qwen3"
        defaults: dict[str, Any] = {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
        if "num_key_value_heads" not in fields.raw:  # with null it has one per query head
            defaults["num_key_value_heads"] = 32
        if qwen3:
            defaults["head_dim"] = 128
        common = common_fields(fields, model_type, spellings={}, defaults=defaults)
        fields.check_rotary(common["head_dim"])
        bias = fields.boolean("attention_bias", default=False)
        return cls(
            **common,
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
            hidden_act=fields.choice("hidden_act", ("silu",), default="silu"),
            rope=fields.rope(common["max_position_embeddings"]),
            # Qwen2 has biases on q, k and v alone, whatever its config says.
            qkv_bias=bias if qwen3 else True,
            output_bias=bias if qwen3 else False,
            qk_norm=qwen3,
            sliding_window=_sliding_window(fields, common["num_hidden_layers"]),
        )

    @classmethod
    def from_gguf(cls, file: GGUFMetadata) -> dict[str, Any]:
        raw = file.decoder() | {"model_type": file.architecture}
        if file.architecture == "qwen3":
            raw |= {
                "head_dim": file.key("attention.key_length"),
                "attention_bias": file.layers_have("attn_q.bias"),
            }
        return raw

    def backbone_shapes(self) -> Iterator[TensorShape]:
        hidden = self.hidden_size
        yield TensorShape("model.embed_tokens.weight", (self.vocab_size, hidden), "embedding")
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}"
            yield from rms_norm(f"{layer}.input_layernorm", hidden, i)
            yield from grouped_attention(self, i, bias=self.qkv_bias, output_bias=self.output_bias)
            if self.qk_norm:
                yield from rms_norm(f"{layer}.self_attn.q_norm", self.head_dim, i)
                yield from rms_norm(f"{layer}.self_attn.k_norm", self.head_dim, i)
            yield from rms_norm(f"{layer}.post_attention_layernorm", hidden, i)
            yield from gated_mlp(self, i, bias=False)
        yield from rms_norm("model.norm", hidden)

    @property
    def attention_window(self) -> int | None:
        return self.sliding_window

    def describe(self) -> Description:
        norm = "RMSNorm, of q and k too" if self.qk_norm else "RMSNorm"
        return Description(rope_words(self.rope), norm, "SwiGLU", "sequential")


def _sliding_window(fields: ConfigFields, layers: int) -> int | None:
    """Read the window where all layers have one or none has; one of some layers alone is not built."""
    window = None
    # 4096 where the key is absent, as in transformers; null and 0 are off.
    if fields.boolean("use_sliding_window", default=False) and fields.raw.get("sliding_window", 4096):
        window = int(fields.integer("sliding_window", default=4096))
    kinds = fields.names("layer_types")
    if kinds and len(kinds) != layers:
        fields.refuse(f"'layer_types' must list one type for each of the {layers} layers, but it lists {len(kinds)}.")
    if not kinds:
        first = fields.integer("max_window_layers", default=28, minimum=0)
        if window and 0 < first < layers:
            fields.refuse(
                f"'max_window_layers' is {first}: with 'use_sliding_window' the other {layers - first} layers see "
                f"{window} positions, and a window of some layers alone is not supported; 0 and {layers} are."
            )
        return window if first < layers else None
    if set(kinds) == {"full_attention"}:
        return None
    if set(kinds) != {"sliding_attention"} or window is None:
        fields.refuse(
            f"'layer_types' has {', '.join(sorted(set(kinds))):.200}; supported: full_attention in all layers, or, "
            "with 'use_sliding_window' and 'sliding_window', sliding_attention in all layers."
        )
    return window
