"""Falcon: attention and MLP side by side on the same input, and one key head for all queries or for a group of them.

Almazrouei et al. 2023, arXiv:2311.16867. Falcon-RW (Penedo et al. 2023, arXiv:2306.01116) is a GPT-2 block with ALiBi
(Press et al. 2022, arXiv:2108.12409) in place of learned positions.
"""

import math
from functools import partial

import numpy as np

from tinyserve.checkpoints.checkpoint import Array, Checkpoint, LazyTensor
from tinyserve.models.base import Loader
from tinyserve.models.batch import Batch
from tinyserve.models.config.falcon import FalconConfig
from tinyserve.models.kv_cache import KVCache
from tinyserve.models.layers import MLP, Attention, Block, ParallelBlock, Rope
from tinyserve.models.llama import rope_frequencies
from tinyserve.tensor.attention import CHUNK
from tinyserve.tensor.matmul import GELU
from tinyserve.tensor.quant import padded


class Falcon:
    """Embedding, blocks, norm; the head is the embedding again where the two are tied."""

    def __init__(self, config: FalconConfig, loader: Loader):
        eps = config.layer_norm_epsilon
        rope = alibi = None
        if config.rope is None:
            alibi = alibi_table(config.num_attention_heads, loader.max_model_len)
        else:
            rope = Rope(rope_frequencies(config.rope, config.head_dim), loader.max_model_len)
        self.config = config
        self.embedding = loader.embedding("transformer.word_embeddings")
        self.blocks: list[Block] = []
        for i in range(config.num_hidden_layers):
            layer = f"transformer.h.{i}"
            attention = Attention(
                loader.linear(f"{layer}.self_attention.query_key_value"),
                loader.linear(f"{layer}.self_attention.dense"),
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                scale=config.head_dim**-0.5,
                rope=rope,
                alibi=alibi,
            )
            mlp = MLP(
                loader.linear(f"{layer}.mlp.dense_h_to_4h", activation=GELU),
                loader.linear(f"{layer}.mlp.dense_4h_to_h"),
            )
            if not config.parallel_attn:
                input_norm = loader.layer_norm(f"{layer}.input_layernorm", eps)
                mlp_norm = loader.layer_norm(f"{layer}.post_attention_layernorm", eps)
                self.blocks.append(Block(input_norm, attention, mlp_norm, mlp))
            elif config.num_ln_in_parallel_attn == 2:
                attention_norm = loader.layer_norm(f"{layer}.ln_attn", eps)
                mlp_norm = loader.layer_norm(f"{layer}.ln_mlp", eps)
                self.blocks.append(ParallelBlock(attention_norm, attention, mlp_norm, mlp))
            else:
                norm = loader.layer_norm(f"{layer}.input_layernorm", eps)
                self.blocks.append(ParallelBlock(norm, attention, norm, mlp))
        self.ln_f = loader.layer_norm("transformer.ln_f", eps)
        self.head = self.embedding.head if config.tie_word_embeddings else loader.head("lm_head")
        self.nbytes = loader.nbytes

    def __call__(self, batch: Batch, cache: KVCache) -> Array:
        x = self.embedding(batch.token_ids)  # (tokens, hidden)
        for block, layer_cache in zip(self.blocks, cache.layers, strict=True):
            x = block(x, batch, layer_cache)
        return x

    def normed(self, hidden: Array) -> Array:
        return self.ln_f(hidden).array()

    def logits(self, hidden: Array) -> Array:
        return self.head(self.ln_f(hidden))


def alibi_table(heads: int, positions: int) -> Array:
    """What a key's position adds to its scores: slope · position (heads, positions up to a multiple of 64) float32.

    Slope, position and product are rounded to bfloat16, as Falcon-RW was trained: beyond 256, neighbours share a bias.
    """
    powers = 2 ** int(math.log2(heads))  # slopes of the largest power of two, and every other one of the next
    slopes = np.concatenate([_slopes(powers), _slopes(2 * powers)[::2]])[:heads]
    where = np.arange(padded(positions, CHUNK), dtype=np.float32)
    table = _rounded_to_bfloat16(np.outer(_rounded_to_bfloat16(slopes), _rounded_to_bfloat16(where)))
    table.flags.writeable = False
    return table


def _slopes(heads: int) -> Array:
    """A geometric sequence that ends at 1/256, for a power of two of heads."""
    return np.float32(2 ** (-8 / heads)) ** np.arange(1, heads + 1, dtype=np.float32)


def _rounded_to_bfloat16(x: Array) -> Array:
    """Round float32 to the nearest 8 bits of mantissa, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


_GGUF_NAMES = {
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}


def sanitize(checkpoint: Checkpoint, config: FalconConfig) -> Checkpoint:
    """The checkpoint under Hugging Face's names, its fused rows in the order q, k, v: GGUF's are, and packed ones."""
    in_groups = partial(_queries_keys_values, groups=config.num_key_value_heads, head_dim=config.head_dim)
    # With two norms GGUF's first one is the MLP's.
    norms = {"attn_norm": "input_layernorm"}
    if config.num_ln_in_parallel_attn == 2:
        norms = {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}
    gguf_names = _GGUF_NAMES | norms
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        match name.removeprefix("transformer.").split("."):
            case ["token_embd", kind]:
                tensors[f"transformer.word_embeddings.{kind}"] = tensor
            case ["output_norm", kind]:
                tensors[f"transformer.ln_f.{kind}"] = tensor
            case ["output" | "lm_head", kind]:
                tensors[f"lm_head.{kind}"] = tensor
            case ["blk", layer, part, kind] if part in gguf_names:
                tensors[f"transformer.h.{layer}.{gguf_names[part]}.{kind}"] = tensor
            case ["h", layer, "self_attention", "query_key_value", kind]:
                fused = f"transformer.h.{layer}.self_attention.query_key_value"
                is_packed = f"{fused}.integers" in checkpoint
                tensors[f"{fused}.{kind}"] = tensor if is_packed else tensor.reordered(in_groups)
            case parts:
                tensors[".".join(["transformer", *parts])] = tensor
    return Checkpoint(tensors, checkpoint.source)


def _queries_keys_values(rows: Array, groups: int, head_dim: int) -> Array:
    """Rows from group after group of queries, a key and a value, to all queries, all keys, all values.

    Multi-query is one group; multi-head, which Falcon-RW interleaves head by head, as many as there are heads.
    """
    grouped = rows.reshape(groups, -1, head_dim, *rows.shape[1:])  # (groups, queries + 2, head_dim, ...)
    parts = grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]
    return np.concatenate([part.reshape(-1, *rows.shape[1:]) for part in parts])
