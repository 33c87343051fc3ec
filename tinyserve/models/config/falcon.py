"""Falcon's config: three block styles in one architecture, and RefinedWeb, the dialect it began in.

Knows only keys and values; the forward pass is tinyserve/models/falcon.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from tinyserve.models.config.base import ConfigFields, DenseConfig, Description, RopeParameters, common_fields
from tinyserve.models.config.description import rope_words
from tinyserve.models.config.gguf import GGUFMetadata
from tinyserve.models.config.shapes import TensorShape, layer_norm, linear


@dataclass(frozen=True, kw_only=True)
class FalconConfig(DenseConfig):
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
    def parse(cls, fields: ConfigFields, model_type: str) -> Self:
        """Read a Falcon or RefinedWeb config.json; defaults are those of transformers' FalconConfig."""
        hidden_size = fields.integer("hidden_size", "n_embed")
        heads = fields.integer("num_attention_heads", "n_head")
        # RefinedWeb does not write the key: there, grouped keys have come with the new decoder and with no other.
        grouped = model_type != "falcon" and fields.has("n_head_kv")
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
        common = common_fields(
            fields,
            "falcon",
            spellings={
                "num_hidden_layers": ("num_hidden_layers", "n_layer"),
                "intermediate_size": ("ffn_hidden_size",),
            },
            defaults={
                "intermediate_size": 4 * hidden_size,
                "tie_word_embeddings": True,
                "bos_token_id": 11,
                "eos_token_id": 11,
            },
            hidden_size=hidden_size,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=positions,
        )
        return cls(
            **common,
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

    @classmethod
    def from_gguf(cls, file: GGUFMetadata) -> dict[str, Any]:
        kv_heads = file.key("attention.head_count_kv", 1)
        two_norms = "blk.0.attn_norm_2.weight" in file.tensors
        file.check_rotation()
        return {
            "model_type": "falcon",
            "num_hidden_layers": file.key("block_count"),
            "hidden_size": file.key("embedding_length"),
            "ffn_hidden_size": file.key("feed_forward_length"),
            "num_attention_heads": file.key("attention.head_count"),
            "num_kv_heads": kv_heads,
            "max_position_embeddings": file.key("context_length"),
            "layer_norm_epsilon": file.key("attention.layer_norm_epsilon"),
            "new_decoder_architecture": two_norms or kv_heads != 1,
            "num_ln_in_parallel_attn": 2 if two_norms else 1,
            "bias": "blk.0.attn_qkv.bias" in file.tensors,
            "rope_parameters": file.rope(),
        }

    def backbone_shapes(self) -> Iterator[TensorShape]:
        hidden, inner, bias = self.hidden_size, self.intermediate_size, self.bias
        qkv = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        if self.num_ln_in_parallel_attn == 2:
            norms = ["ln_attn", "ln_mlp"]
        else:
            norms = ["input_layernorm"] + ["post_attention_layernorm"] * (not self.parallel_attn)
        yield TensorShape("transformer.word_embeddings.weight", (self.vocab_size, hidden), "embedding")
        for i in range(self.num_hidden_layers):
            block = f"transformer.h.{i}"
            for norm in norms:
                yield from layer_norm(f"{block}.{norm}", hidden, i)
            yield from linear(f"{block}.self_attention.query_key_value", qkv, hidden, "attention", i, bias)
            yield from linear(f"{block}.self_attention.dense", hidden, hidden, "attention", i, bias)
            yield from linear(f"{block}.mlp.dense_h_to_4h", inner, hidden, "mlp", i, bias)
            yield from linear(f"{block}.mlp.dense_4h_to_h", hidden, inner, "mlp", i, bias)
        yield from layer_norm("transformer.ln_f", hidden)

    @property
    def attention_window(self) -> int | None:
        return None

    def describe(self) -> Description:
        block, norms = "sequential", self.num_ln_in_parallel_attn
        if self.parallel_attn:
            block = f"parallel, {norms} norm{'s' * (norms > 1)}"
        return Description(rope_words(self.rope, otherwise="ALiBi"), "LayerNorm", "GELU (erf)", block)
