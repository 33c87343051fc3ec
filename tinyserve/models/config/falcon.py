"""Falcon's config: three block styles in one architecture, and RefinedWeb, the dialect it began in.

Knows only keys and values; the forward pass is tinyserve/models/falcon.py.
"""

from dataclasses import dataclass
from typing import Self

from tinyserve.models.config.base import ATTENTION, Fields, ModelConfig, RopeParameters

LEGACY_TYPES = ("RefinedWeb", "RefinedWebModel")


@dataclass(frozen=True, kw_only=True)
class FalconConfig(ModelConfig):
    """Falcon (Almazrouei et al., 2023): 7B is multi-query, 40B grouped with two norms, RW has ALiBi."""

    layer_norm_epsilon: float
    activation: str
    multi_query: bool
    new_decoder_architecture: bool
    parallel_attn: bool
    num_ln_in_parallel_attn: int  # 2: ln_attn and ln_mlp; 1: one input_layernorm feeds both
    bias: bool  # of the linear layers; the norms always have one
    alibi: bool
    rope: RopeParameters | None  # None when alibi

    @classmethod
    def parse(cls, fields: Fields, model_type: str) -> Self:
        """Read a Falcon or RefinedWeb config.json; defaults are those of transformers' FalconConfig."""
        hidden_size = fields.integer("hidden_size", "n_embed")
        heads = fields.integer("num_attention_heads", "n_head")
        layers = fields.integer("num_hidden_layers", "n_layer")
        # RefinedWeb does not write the key: there, grouped keys have come with the new decoder and with no other.
        grouped = model_type in LEGACY_TYPES and fields.has("n_head_kv")
        new_decoder = fields.boolean("new_decoder_architecture", default=grouped)
        multi_query = fields.boolean("multi_query", default=True)
        parallel_attn = fields.boolean("parallel_attn", default=True)
        norms = fields.integer("num_ln_in_parallel_attn", default=2 if new_decoder else 1)
        if new_decoder and not parallel_attn:
            fields.refuse("'parallel_attn' is false, but a block of 'new_decoder_architecture' is always parallel.")
        if norms > 2 or (norms == 2 and not new_decoder):
            fields.refuse(f"'num_ln_in_parallel_attn' is {norms}; supported: 1, or 2 with 'new_decoder_architecture'.")
        if new_decoder:
            kv_heads = fields.integer("num_kv_heads", "n_head_kv", default=heads)
        else:
            kv_heads = 1 if multi_query else heads  # falcon-7b writes 71 and has 1
        head_dim = fields.equal_heads(hidden_size, heads, kv_heads)
        alibi = fields.boolean("alibi", default=False)
        if not alibi:
            fields.check_rotary(head_dim)
        positions = fields.integer("max_position_embeddings", default=2048)
        return cls(
            model_type="falcon",
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=fields.integer("ffn_hidden_size", default=4 * hidden_size),
            max_position_embeddings=positions,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=True),
            bos_token_id=fields.token_id("bos_token_id", default=11),
            eos_token_ids=fields.token_ids("eos_token_id", default=11),
            layer_types=(ATTENTION,) * layers,
            layer_norm_epsilon=fields.number("layer_norm_epsilon", default=1e-5),
            activation=fields.choice("activation", ("gelu",), default="gelu"),
            multi_query=multi_query,
            new_decoder_architecture=new_decoder,
            parallel_attn=parallel_attn,
            num_ln_in_parallel_attn=norms,
            bias=fields.boolean("bias", default=False),
            alibi=alibi,
            rope=None if alibi else fields.rope(positions),
        )
