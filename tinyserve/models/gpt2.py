"""GPT-2: learned positions, LayerNorm before each half, a plain MLP, every head with its own keys.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Its checkpoints keep matrices as
(inputs, outputs), the other way round from everybody else's.
"""

from tinyserve.checkpoints.checkpoint import Array, Checkpoint, LazyTensor
from tinyserve.models.base import Loader
from tinyserve.models.batch import Batch
from tinyserve.models.config.gpt2 import GPT2Config
from tinyserve.models.kv_cache import KVCache
from tinyserve.models.layers import MLP, Attention, Block
from tinyserve.tensor.matmul import GELU, GELU_TANH

_ACTIVATIONS = {"gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH, "gelu": GELU}


class GPT2:
    """Token and position embeddings, blocks, norm; the head is the token embedding again."""

    def __init__(self, config: GPT2Config, loader: Loader):
        eps = config.layer_norm_epsilon
        self.config = config
        self.wte = loader.embedding("wte")
        self.wpe = loader.array("wpe.weight")  # (positions, hidden)
        self.blocks = []
        for i in range(config.num_hidden_layers):
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
            ln_1, ln_2 = loader.layer_norm(f"h.{i}.ln_1", eps), loader.layer_norm(f"h.{i}.ln_2", eps)
            self.blocks.append(Block(ln_1, attention, ln_2, mlp))
        self.ln_f = loader.layer_norm("ln_f", eps)
        self.head = self.wte.head if config.tie_word_embeddings else loader.head("lm_head")
        self.nbytes = loader.nbytes

    def __call__(self, batch: Batch, cache: KVCache) -> Array:
        x = self.wte(batch.token_ids) + self.wpe[batch.positions]  # (tokens, hidden)
        for block, layer_cache in zip(self.blocks, cache.layers, strict=True):
            x = block(x, batch, layer_cache)
        return x

    def normed(self, hidden: Array) -> Array:
        return self.ln_f(hidden).array()

    def logits(self, hidden: Array) -> Array:
        return self.head(self.ln_f(hidden))


_GGUF_NAMES = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}


def sanitize(checkpoint: Checkpoint, config: GPT2Config) -> Checkpoint:
    """The checkpoint under the original's bare names: no "transformer." prefix, no buffers, GGUF's matrices turned."""
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        match name.removeprefix("transformer.").split("."):
            case ["h", _, "attn", "bias" | "masked_bias"]:
                continue  # the causal mask, kept by old checkpoints
            case ["token_embd", kind]:
                tensors[f"wte.{kind}"] = tensor
            case ["position_embd", kind]:
                tensors[f"wpe.{kind}"] = tensor
            case ["output_norm", kind]:
                tensors[f"ln_f.{kind}"] = tensor
            case ["output", kind]:
                tensors[f"lm_head.{kind}"] = tensor
            case ["blk", layer, part, kind] if part in _GGUF_NAMES:
                is_matrix = len(tensor.shape) == 2
                tensors[f"h.{layer}.{_GGUF_NAMES[part]}.{kind}"] = tensor.transposed() if is_matrix else tensor
            case parts:
                tensors[".".join(parts)] = tensor
    return Checkpoint(tensors, checkpoint.source)
