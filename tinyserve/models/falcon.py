"""Falcon: attention and MLP side by side on the same input, and one key head for all queries or for a group of them.

Almazrouei et al. 2023, arXiv:2311.16867. Falcon-RW (Penedo et al. 2023, arXiv:2306.01116) is a GPT-2 block with ALiBi
(Press et al. 2022, arXiv:2108.12409) in place of learned positions.
"""

import math
from functools import partial

import numpy as np

from tinyserve.checkpoints.checkpoint import Array, Checkpoint, LazyTensor
from tinyserve.models.base import DecoderModel, Loader, gguf_names
from tinyserve.models.config.falcon import FalconConfig
from tinyserve.models.layers import MLP, Attention, Block, ParallelBlock, Rope
from tinyserve.models.llama import rope_frequencies
from tinyserve.tensor.attention import CHUNK
from tinyserve.tensor.matmul import GELU
from tinyserve.tensor.quant import padded


class Falcon(DecoderModel):
    """Parallel blocks behind LayerNorms, with rotary positions; or sequential ones, with ALiBi."""

    def __init__(self, config: FalconConfig, loader: Loader):
        rope = alibi = None
        if config.rope is None:
            alibi = alibi_table(config.num_attention_heads, loader.max_model_len)
        else:
            rope = Rope(rope_frequencies(config.rope, config.head_dim), loader.max_model_len)
        blocks = [_block(config, loader, f"transformer.h.{i}", rope, alibi) for i in loader.layers]
        norm = partial(loader.layer_norm, "transformer.ln_f", config.layer_norm_epsilon)
        super().__init__(config, loader, "transformer.word_embeddings", blocks, norm)


def _block(config: FalconConfig, loader: Loader, layer: str, rope: Rope | None, alibi: Array | None) -> Block:
    eps = config.layer_norm_epsilon
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
        return Block(input_norm, attention, loader.layer_norm(f"{layer}.post_attention_layernorm", eps), mlp)
    if config.num_ln_in_parallel_attn == 2:
        attention_norm = loader.layer_norm(f"{layer}.ln_attn", eps)
        return ParallelBlock(attention_norm, attention, loader.layer_norm(f"{layer}.ln_mlp", eps), mlp)
    norm = loader.layer_norm(f"{layer}.input_layernorm", eps)
    return ParallelBlock(norm, attention, norm, mlp)


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


_GGUF_PARTS = {
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
    renamed = gguf_names(_GGUF_PARTS | norms, embedding="word_embeddings", layers="h", norm="ln_f")
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        name = name.removeprefix("transformer.")
        match name.split("."):
            case ["h", layer, "self_attention", "query_key_value", _]:
                if f"transformer.h.{layer}.self_attention.query_key_value.stream" not in checkpoint:
                    tensor = tensor.reordered(in_groups)
        name = renamed(name)
        tensors[name if name.startswith("lm_head.") else f"transformer.{name}"] = tensor
    return Checkpoint(tensors, checkpoint.source)


def _queries_keys_values(rows: Array, groups: int, head_dim: int) -> Array:
    """Rows from group after group of queries, a key and a value, to all queries, all keys, all values.

    Multi-query is one group; multi-head, which Falcon-RW interleaves head by head, as many as there are heads.
    """
    grouped = rows.reshape(groups, -1, head_dim, *rows.shape[1:])  # (groups, queries + 2, head_dim, ...)
    parts = grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]
    return np.concatenate([part.reshape(-1, *rows.shape[1:]) for part in parts])
