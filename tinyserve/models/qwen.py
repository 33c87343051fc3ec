"""Qwen2, 2.5 and the dense Qwen3: a Llama whose queries and keys have biases, or are normalised head by head.

Yang et al. 2024, arXiv:2407.10671 and 2412.15115; Yang et al. 2025, arXiv:2505.09388. Norms on queries and keys, which
keep the scores of attention small: Dehghani et al. 2023, arXiv:2302.05442.
"""

from functools import partial

from tinyserve.checkpoints.checkpoint import Checkpoint
from tinyserve.models.base import DecoderModel, Loader, gguf_names
from tinyserve.models.config.qwen import QwenConfig
from tinyserve.models.layers import MLP, Attention, Block, QKNorm, Rope
from tinyserve.models.llama import GGUF_PARTS, rope_frequencies


class Qwen(DecoderModel):
    """Grouped attention and a gated MLP, each behind an RMSNorm."""

    def __init__(self, config: QwenConfig, loader: Loader):
        rope = Rope(rope_frequencies(config.rope, config.head_dim), loader.max_model_len)
        blocks = [_block(config, loader, f"model.layers.{i}", rope) for i in loader.layers]
        norm = partial(loader.rms_norm, "model.norm", config.rms_norm_eps)
        super().__init__(config, loader, "model.embed_tokens", blocks, norm)


def _block(config: QwenConfig, loader: Loader, layer: str, rope: Rope) -> Block:
    eps, qk_norm = config.rms_norm_eps, None
    if config.qk_norm:
        q_norm, k_norm = (loader.rms_norm(f"{layer}.self_attn.{part}_norm", eps) for part in "qk")
        qk_norm = QKNorm(q_norm, k_norm)
    attention = Attention(
        loader.linear(*(f"{layer}.self_attn.{part}_proj" for part in "qkv")),
        loader.linear(f"{layer}.self_attn.o_proj"),
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        scale=config.head_dim**-0.5,
        rope=rope,
        window=config.attention_window or 0,
        qk_norm=qk_norm,
    )
    mlp = MLP(
        loader.gated(f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"),
        loader.linear(f"{layer}.mlp.down_proj"),
    )
    attention_norm = loader.rms_norm(f"{layer}.input_layernorm", eps)
    return Block(attention_norm, attention, loader.rms_norm(f"{layer}.post_attention_layernorm", eps), mlp)


def sanitize(checkpoint: Checkpoint, config: QwenConfig) -> Checkpoint:
    """The checkpoint under Hugging Face's names; llama.cpp leaves Qwen's q and k rows as they are."""
    renamed = gguf_names(GGUF_PARTS | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"})
    return Checkpoint({renamed(name): tensor for name, tensor in checkpoint.tensors.items()}, checkpoint.source)
