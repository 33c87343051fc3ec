"""GPT-2: learned positions, LayerNorm before each half, a plain MLP, every head with its own keys.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Its checkpoints keep matrices as
(inputs, outputs), the other way round from everybody else's.
"""

from functools import partial

from tinyserve.checkpoints.checkpoint import Array, Checkpoint, LazyTensor
from tinyserve.models.base import DecoderModel, Loader, gguf_names
from tinyserve.models.batch import Batch
from tinyserve.models.config.gpt2 import GPT2Config
from tinyserve.models.layers import MLP, Attention, Block
from tinyserve.tensor import rows
from tinyserve.tensor.matmul import GELU, GELU_TANH

_ACTIVATIONS = {"gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH, "gelu": GELU}


class GPT2(DecoderModel):
    """Token and position embeddings are added; each half of a block is behind a LayerNorm."""

    def __init__(self, config: GPT2Config, loader: Loader):
        if loader.is_first:
            self.wpe = loader.array("wpe.weight")  # (positions, hidden)
        blocks = [_block(config, loader, i) for i in loader.layers]
        super().__init__(config, loader, "wte", blocks, partial(loader.layer_norm, "ln_f", config.layer_norm_epsilon))

    def embed(self, batch: Batch) -> Array:
        x = super().embed(batch)
        rows.add_rows(x, self.wpe, batch.positions)
        return x


def _block(config: GPT2Config, loader: Loader, i: int) -> Block:
    scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= i + 1
    attention = Attention(
        loader.linear(f"h.{i}.attn.c_attn", transposed=True),
        loader.linear(f"h.{i}.attn.c_proj", transposed=True),
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        scale,
    )
    mlp = MLP(
        loader.linear(f"h.{i}.mlp.c_fc", transposed=True, activation=_ACTIVATIONS[config.activation_function]),
        loader.linear(f"h.{i}.mlp.c_proj", transposed=True),
    )
    ln_1, ln_2 = (loader.layer_norm(f"h.{i}.{name}", config.layer_norm_epsilon) for name in ("ln_1", "ln_2"))
    return Block(ln_1, attention, ln_2, mlp)


_GGUF_PARTS = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


def sanitize(checkpoint: Checkpoint, config: GPT2Config) -> Checkpoint:
    """The checkpoint under the original's bare names: no "transformer." prefix, no buffers, GGUF's matrices turned."""
    renamed = gguf_names(_GGUF_PARTS, embedding="wte", layers="h", norm="ln_f", position_embd="wpe")
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        name = name.removeprefix("transformer.")
        match name.split("."):
            case ["h", _, "attn", "bias" | "masked_bias"]:
                continue  # the causal mask, kept by old checkpoints
            case ["blk", _, part, _] if part in _GGUF_PARTS and len(tensor.shape) == 2:
                tensor = tensor.transposed()
        tensors[renamed(name)] = tensor
    return Checkpoint(tensors, checkpoint.source)
