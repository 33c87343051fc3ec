"""GPT-2's config: learned positions, LayerNorm, one fused QKV projection, every head with its own keys.

Knows only keys and values; the forward pass is tinyserve/models/gpt2.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from tinyserve.models.config.base import ConfigFields, DenseConfig, Description, common_fields
from tinyserve.models.config.gguf import GGUFMetadata
from tinyserve.models.config.shapes import TensorShape, conv1d, layer_norm


@dataclass(frozen=True, kw_only=True)
class GPT2Config(DenseConfig):
    """GPT-2 (Radford et al., 2019); n_embd, n_layer, n_head and the others under their modern names."""

    layer_norm_epsilon: float
    activation_function: str
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool

    @classmethod
    def parse(cls, fields: ConfigFields, model_type: str) -> Self:
        """Read a GPT-2 config.json; defaults are those of transformers' GPT2Config."""
        hidden_size = fields.integer("n_embd", "hidden_size")
        heads = fields.integer("n_head", "num_attention_heads")
        common = common_fields(
            fields,
            model_type,
            spellings={
                "num_hidden_layers": ("n_layer", "num_hidden_layers"),
                "intermediate_size": ("n_inner", "intermediate_size"),
                "max_position_embeddings": ("n_positions", "max_position_embeddings"),
            },
            defaults={
                "intermediate_size": 4 * hidden_size,
                "tie_word_embeddings": True,
                "bos_token_id": 50256,
                "eos_token_id": 50256,
            },
            hidden_size=hidden_size,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=fields.equal_heads(hidden_size, heads, heads),
        )
        return cls(
            **common,
            layer_norm_epsilon=fields.number("layer_norm_epsilon", default=1e-5),
            # gelu_pytorch_tanh is gelu_new under another name: the same tanh approximation.
            activation_function=fields.choice(
                "activation_function", ("gelu_new", "gelu_pytorch_tanh", "gelu"), default="gelu_new"
            ),
            scale_attn_weights=fields.boolean("scale_attn_weights", default=True),
            scale_attn_by_inverse_layer_idx=fields.boolean("scale_attn_by_inverse_layer_idx", default=False),
        )

    @classmethod
    def from_gguf(cls, file: GGUFMetadata) -> dict[str, Any]:
        return {
            "model_type": "gpt2",
            "n_layer": file.key("block_count"),
            "n_embd": file.key("embedding_length"),
            "n_head": file.key("attention.head_count"),
            "n_inner": file.key("feed_forward_length"),
            "n_positions": file.key("context_length"),
            "layer_norm_epsilon": file.key("attention.layer_norm_epsilon"),
            "activation_function": "gelu_new",
        }

    def backbone_shapes(self) -> Iterator[TensorShape]:
        hidden, inner = self.hidden_size, self.intermediate_size
        yield TensorShape("wte.weight", (self.vocab_size, hidden), "embedding")
        yield TensorShape("wpe.weight", (self.max_position_embeddings, hidden), "position")
        for i in range(self.num_hidden_layers):
            block = f"h.{i}"
            yield from layer_norm(f"{block}.ln_1", hidden, i)
            yield from conv1d(f"{block}.attn.c_attn", hidden, 3 * hidden, "attention", i)
            yield from conv1d(f"{block}.attn.c_proj", hidden, hidden, "attention", i)
            yield from layer_norm(f"{block}.ln_2", hidden, i)
            yield from conv1d(f"{block}.mlp.c_fc", hidden, inner, "mlp", i)
            yield from conv1d(f"{block}.mlp.c_proj", inner, hidden, "mlp", i)
        yield from layer_norm("ln_f", hidden)

    @property
    def attention_window(self) -> int | None:
        return None

    def describe(self) -> Description:
        gelu = "GELU (erf)" if self.activation_function == "gelu" else "GELU (tanh)"
        return Description("learned", "LayerNorm", gelu, "sequential")
