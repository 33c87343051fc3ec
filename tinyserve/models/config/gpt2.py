"""GPT-2's config: learned positions, LayerNorm, one fused QKV projection, every head with its own keys.

Knows only keys and values; the forward pass is tinyserve/models/gpt2.py.
"""

from dataclasses import dataclass
from typing import Self

from tinyserve.models.config.base import ATTENTION, Fields, ModelConfig


@dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """GPT-2 (Radford et al., 2019); n_embd, n_layer, n_head and the others under their modern names."""

    layer_norm_epsilon: float
    activation_function: str
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool

    @classmethod
    def parse(cls, fields: Fields, model_type: str) -> Self:
        """Read a GPT-2 config.json; defaults are those of transformers' GPT2Config."""
        hidden_size = fields.integer("n_embd", "hidden_size")
        heads = fields.integer("n_head", "num_attention_heads")
        layers = fields.integer("n_layer", "num_hidden_layers")
        return cls(
            model_type=model_type,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=fields.equal_heads(hidden_size, heads, heads),
            intermediate_size=fields.integer("n_inner", "intermediate_size", default=4 * hidden_size),
            max_position_embeddings=fields.integer("n_positions", "max_position_embeddings"),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=True),
            bos_token_id=fields.token_id("bos_token_id", default=50256),
            eos_token_ids=fields.token_ids("eos_token_id", default=50256),
            layer_types=(ATTENTION,) * layers,
            layer_norm_epsilon=fields.number("layer_norm_epsilon", default=1e-5),
            # gelu_pytorch_tanh is gelu_new under another name: the same tanh approximation.
            activation_function=fields.choice(
                "activation_function", ("gelu_new", "gelu_pytorch_tanh", "gelu"), default="gelu_new"
            ),
            scale_attn_weights=fields.boolean("scale_attn_weights", default=True),
            scale_attn_by_inverse_layer_idx=fields.boolean("scale_attn_by_inverse_layer_idx", default=False),
        )
