"""Llama, and what is built like it: Llama 1 to 3, TinyLlama, SmolLM2, Mistral.

Touvron et al. 2023, arXiv:2302.13971 and 2307.09288; Grattafiori et al. 2024, arXiv:2407.21783; Jiang et al. 2023,
arXiv:2310.06825. Pre-norm by RMSNorm, rotary positions, grouped-query attention, a gated MLP.
"""

from functools import partial

import numpy as np

from tinyserve.checkpoints.checkpoint import Array, Checkpoint, LazyTensor
from tinyserve.errors import CheckpointError
from tinyserve.models.base import DecoderModel, Loader, gguf_names
from tinyserve.models.config import RopeParameters
from tinyserve.models.config.llama import LlamaConfig
from tinyserve.models.layers import MLP, Attention, Block, Rope


class Llama(DecoderModel):
    """Grouped-query attention and a gated MLP, each after an RMSNorm."""

    def __init__(self, config: LlamaConfig, loader: Loader):
        rope = Rope(rope_frequencies(config.rope, config.head_dim), loader.max_model_len)
        blocks = [_block(config, loader, f"model.layers.{i}", rope) for i in loader.layers]
        norm = partial(loader.rms_norm, "model.norm", config.rms_norm_eps)
        super().__init__(config, loader, "model.embed_tokens", blocks, norm)


def _block(config: LlamaConfig, loader: Loader, layer: str, rope: Rope) -> Block:
    attention = Attention(
        loader.linear(*(f"{layer}.self_attn.{part}_proj" for part in "qkv")),
        loader.linear(f"{layer}.self_attn.o_proj"),
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        scale=config.head_dim**-0.5,
        rope=rope,
        window=config.attention_window or 0,
    )
    mlp = MLP(
        loader.gated(f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"),
        loader.linear(f"{layer}.mlp.down_proj"),
    )
    attention_norm = loader.rms_norm(f"{layer}.input_layernorm", config.rms_norm_eps)
    mlp_norm = loader.rms_norm(f"{layer}.post_attention_layernorm", config.rms_norm_eps)
    return Block(attention_norm, attention, mlp_norm, mlp)


def rope_frequencies(rope: RopeParameters, head_dim: int) -> Array:
    """The angle a position adds to each pair of a head's numbers: theta^(-2i/head_dim), stretched as the model was."""
    f = 1.0 / np.float32(rope.rope_theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    if rope.rope_type == "linear":
        return f / np.float32(rope.factor)
    if rope.rope_type != "llama3":
        return f
    # Llama 3.1: long waves are slowed down by the factor, short ones kept, those between blended.
    wavelength = 2 * np.pi / f
    low, high, old = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings
    blend = np.clip((old / wavelength - low) / (high - low), 0, 1).astype(np.float32)
    return (1 - blend) * f / np.float32(rope.factor) + blend * f


GGUF_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def sanitize(checkpoint: Checkpoint, config: LlamaConfig) -> Checkpoint:
    """The checkpoint under Hugging Face's names, with GGUF's reordered q and k rows put back."""
    if "token_embd.weight" not in checkpoint:
        return checkpoint
    renamed = gguf_names(GGUF_PARTS)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        match name.split("."):
            case ["rope_freqs", "weight"]:
                check_divisors(tensor, config.rope, config.head_dim)
                continue
            case ["blk", _, part, _] if part in heads:
                tensor = tensor.reordered(partial(rotate_halves, heads=heads[part]))
        tensors[renamed(name)] = tensor
    return Checkpoint(tensors, checkpoint.source)


def check_divisors(tensor: LazyTensor, rope: RopeParameters, head_dim: int) -> None:
    """GGUF's rope_freqs divide the frequencies: what the config's rule makes of them must come to the same."""
    expected = rope_frequencies(RopeParameters(rope.rope_theta), head_dim) / rope_frequencies(rope, head_dim)
    if tensor.shape != expected.shape or not np.allclose(tensor.read(), expected, rtol=1e-4):
        raise CheckpointError(
            f"{tensor.file}: tensor 'rope_freqs.weight' is not Llama 3's scaling of {rope.factor:g} from "
            f"{rope.original_max_position_embeddings} positions, and no other is supported."
        )


def rotate_halves(weight: Array, heads: int) -> Array:
    """Rows of each head from GGUF's order (a pair's two numbers side by side) to halves (all firsts, all seconds)."""
    rows = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)
