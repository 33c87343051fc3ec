"""What a config implies: every tensor's name and shape, and from these the parameters, bytes and cache sizes.

Knows names and integers only: it never sees an array, so a model can be measured without its weights.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from tinyserve.errors import ConfigError, UserError
from tinyserve.models.config import MAMBA, FalconConfig, GPT2Config, GraniteConfig, LlamaConfig, ModelConfig

COMPONENTS: Final = (
    "embedding",
    "position",
    "attention",
    "mlp",
    "norm",
    "mamba",
    "experts",
    "router",
    "head",
)
WEIGHT_DTYPES: Final = ("float32", "bfloat16", "int8", "int4")
KV_DTYPES: Final = ("float32", "bfloat16", "int8")

_SHORT: Final = {"w8a16": "int8", "w8a8": "int8", "w4a16": "int4", "w4a8": "int4"}
_BYTES: Final = {"float32": 4, "bfloat16": 2}
# A float16 scale for so many inputs; beside 16-bit activations, 8 bits need fewer.
_GROUP, _WIDE_GROUP, _SCALE_BYTES = 32, 64, 2


@dataclass(frozen=True)
class TensorShape:
    """One tensor of a checkpoint: name and shape as transformers writes them, and the part it belongs to."""

    name: str
    shape: tuple[int, ...]
    component: str  # one of COMPONENTS
    layer: int | None = None
    in_axis: int = -1  # the axis of a matrix that meets the activations: 0 in GPT-2's Conv1D

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is kept in the model's dtype; norms, biases, positions and convolutions are float32."""
        return len(self.shape) >= 2 and self.component != "position" and not self.name.endswith("conv1d.weight")


def tensor_shapes(config: ModelConfig) -> Iterator[TensorShape]:
    """Yield every tensor of this architecture's Hugging Face checkpoint, layer by layer."""
    match config:
        case GPT2Config():
            yield from _gpt2(config)
        case FalconConfig():
            yield from _falcon(config)
        case LlamaConfig():
            yield from _llama(config)
        case GraniteConfig():
            yield from _granite(config)
        case _:
            raise ConfigError(f"costs.py has no case for {type(config).__name__} yet: add its tensors there.")
    if not config.tie_word_embeddings:
        yield TensorShape("lm_head.weight", (config.vocab_size, config.hidden_size), "head")


def _linear(
    name: str, rows: int, columns: int, component: str, layer: int, bias: bool = False
) -> Iterator[TensorShape]:
    """Yield a torch Linear, [out, in], and its bias."""
    yield TensorShape(f"{name}.weight", (rows, columns), component, layer)
    if bias:
        yield TensorShape(f"{name}.bias", (rows,), component, layer)


def _conv1d(name: str, rows: int, columns: int, component: str, layer: int) -> Iterator[TensorShape]:
    """Yield GPT-2's Conv1D, a Linear stored as [in, out], and its bias."""
    yield TensorShape(f"{name}.weight", (rows, columns), component, layer, in_axis=0)
    yield TensorShape(f"{name}.bias", (columns,), component, layer)


def _layer_norm(name: str, hidden: int, layer: int | None = None) -> Iterator[TensorShape]:
    """Yield a LayerNorm, which has a bias; an RMSNorm has none."""
    yield TensorShape(f"{name}.weight", (hidden,), "norm", layer)
    yield TensorShape(f"{name}.bias", (hidden,), "norm", layer)


def _gpt2(config: GPT2Config) -> Iterator[TensorShape]:
    hidden, inner = config.hidden_size, config.intermediate_size
    yield TensorShape("wte.weight", (config.vocab_size, hidden), "embedding")
    yield TensorShape("wpe.weight", (config.max_position_embeddings, hidden), "position")
    for i in range(config.num_hidden_layers):
        block = f"h.{i}"
        yield from _layer_norm(f"{block}.ln_1", hidden, i)
        yield from _conv1d(f"{block}.attn.c_attn", hidden, 3 * hidden, "attention", i)
        yield from _conv1d(f"{block}.attn.c_proj", hidden, hidden, "attention", i)
        yield from _layer_norm(f"{block}.ln_2", hidden, i)
        yield from _conv1d(f"{block}.mlp.c_fc", hidden, inner, "mlp", i)
        yield from _conv1d(f"{block}.mlp.c_proj", inner, hidden, "mlp", i)
    yield from _layer_norm("ln_f", hidden)


def _falcon(config: FalconConfig) -> Iterator[TensorShape]:
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.bias
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    if config.num_ln_in_parallel_attn == 2:
        norms = ["ln_attn", "ln_mlp"]
    else:
        norms = ["input_layernorm"] + ["post_attention_layernorm"] * (not config.parallel_attn)
    yield TensorShape("transformer.word_embeddings.weight", (config.vocab_size, hidden), "embedding")
    for i in range(config.num_hidden_layers):
        block = f"transformer.h.{i}"
        for norm in norms:
            yield from _layer_norm(f"{block}.{norm}", hidden, i)
        yield from _linear(f"{block}.self_attention.query_key_value", qkv, hidden, "attention", i, bias)
        yield from _linear(f"{block}.self_attention.dense", hidden, hidden, "attention", i, bias)
        yield from _linear(f"{block}.mlp.dense_h_to_4h", inner, hidden, "mlp", i, bias)
        yield from _linear(f"{block}.mlp.dense_4h_to_h", hidden, inner, "mlp", i, bias)
    yield from _layer_norm("transformer.ln_f", hidden)


def _llama(config: LlamaConfig) -> Iterator[TensorShape]:
    hidden = config.hidden_size
    yield TensorShape("model.embed_tokens.weight", (config.vocab_size, hidden), "embedding")
    for i in range(config.num_hidden_layers):
        yield TensorShape(f"model.layers.{i}.input_layernorm.weight", (hidden,), "norm", i)
        yield from _grouped_attention(config, i, config.attention_bias)
        yield TensorShape(f"model.layers.{i}.post_attention_layernorm.weight", (hidden,), "norm", i)
        yield from _gated_mlp(config, i, config.mlp_bias)
    yield TensorShape("model.norm.weight", (hidden,), "norm")


def _granite(config: GraniteConfig) -> Iterator[TensorShape]:
    hidden = config.hidden_size
    yield TensorShape("model.embed_tokens.weight", (config.vocab_size, hidden), "embedding")
    for i, kind in enumerate(config.layer_types):
        block = f"model.layers.{i}"
        yield TensorShape(f"{block}.input_layernorm.weight", (hidden,), "norm", i)
        if kind == MAMBA:
            yield from _mamba(config, i)
        else:
            yield from _grouped_attention(config, i, config.attention_bias)
        yield TensorShape(f"{block}.post_attention_layernorm.weight", (hidden,), "norm", i)
        if config.num_local_experts:
            yield from _experts(config, i)
        if config.shared_intermediate_size:
            shared = config.shared_intermediate_size  # gate above up, in one matrix
            yield from _linear(f"{block}.shared_mlp.input_linear", 2 * shared, hidden, "mlp", i)
            yield from _linear(f"{block}.shared_mlp.output_linear", hidden, shared, "mlp", i)
        if config.model_type == "granite":
            yield from _gated_mlp(config, i, config.mlp_bias)
    yield TensorShape("model.norm.weight", (hidden,), "norm")


def _grouped_attention(config: ModelConfig, i: int, bias: bool) -> Iterator[TensorShape]:
    name, hidden = f"model.layers.{i}.self_attn", config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    yield from _linear(f"{name}.q_proj", queries, hidden, "attention", i, bias)
    yield from _linear(f"{name}.k_proj", keys, hidden, "attention", i, bias)
    yield from _linear(f"{name}.v_proj", keys, hidden, "attention", i, bias)
    yield from _linear(f"{name}.o_proj", hidden, queries, "attention", i, bias)


def _gated_mlp(config: ModelConfig, i: int, bias: bool) -> Iterator[TensorShape]:
    name, hidden, inner = f"model.layers.{i}.mlp", config.hidden_size, config.intermediate_size
    yield from _linear(f"{name}.gate_proj", inner, hidden, "mlp", i, bias)
    yield from _linear(f"{name}.up_proj", inner, hidden, "mlp", i, bias)
    yield from _linear(f"{name}.down_proj", hidden, inner, "mlp", i, bias)


def _experts(config: GraniteConfig, i: int) -> Iterator[TensorShape]:
    name, hidden = f"model.layers.{i}.block_sparse_moe", config.hidden_size
    experts, inner = config.num_local_experts, config.intermediate_size
    yield TensorShape(f"{name}.router.layer.weight", (experts, hidden), "router", i)
    yield TensorShape(f"{name}.input_linear.weight", (experts, 2 * inner, hidden), "experts", i)
    yield TensorShape(f"{name}.output_linear.weight", (experts, hidden, inner), "experts", i)


def _mamba(config: GraniteConfig, i: int) -> Iterator[TensorShape]:
    name, hidden, heads = f"model.layers.{i}.mamba", config.hidden_size, config.mamba_n_heads
    inner, conv_dim = config.mamba_intermediate_size, config.mamba_conv_dim
    rows = inner + conv_dim + heads  # gate | x, B, C | dt
    yield from _linear(f"{name}.in_proj", rows, hidden, "mamba", i, config.mamba_proj_bias)
    yield TensorShape(f"{name}.conv1d.weight", (conv_dim, 1, config.mamba_d_conv), "mamba", i)
    if config.mamba_conv_bias:
        yield TensorShape(f"{name}.conv1d.bias", (conv_dim,), "mamba", i)
    for vector in ("dt_bias", "A_log", "D"):
        yield TensorShape(f"{name}.{vector}", (heads,), "mamba", i)
    yield TensorShape(f"{name}.norm.weight", (inner,), "mamba", i)
    yield from _linear(f"{name}.out_proj", hidden, inner, "mamba", i, config.mamba_proj_bias)


@lru_cache(maxsize=64)
def _tensors(config: ModelConfig) -> tuple[TensorShape, ...]:
    return tuple(tensor_shapes(config))


def parameter_count(config: ModelConfig) -> int:
    """How many parameters the checkpoint holds; a tied head is counted once."""
    return sum(tensor.size for tensor in _tensors(config))


def parameters_by_component(config: ModelConfig) -> dict[str, int]:
    """How many parameters each component holds, in the order of COMPONENTS, leaving out those it has not."""
    counts = dict.fromkeys(COMPONENTS, 0)
    for tensor in _tensors(config):
        counts[tensor.component] += tensor.size
    return {component: count for component, count in counts.items() if count}


def active_parameter_count(config: ModelConfig) -> int:
    """How many parameters one token meets: all of them, less the experts the router passes over."""
    idle = parameters_by_component(config).get("experts", 0)
    return parameter_count(config) - idle + int(idle * _active_experts(config))


def _active_experts(config: ModelConfig) -> float:
    """The share of a layer's experts that one token passes through."""
    if isinstance(config, GraniteConfig) and config.num_local_experts:
        return config.num_experts_per_tok / config.num_local_experts
    return 1.0


def tensor_bytes(tensor: TensorShape, dtype: str) -> int:
    """The bytes of one tensor in memory; `dtype` is one of WEIGHT_DTYPES."""
    group_of_8_bits = _GROUP if dtype.endswith("a8") else _WIDE_GROUP
    dtype = _SHORT.get(dtype, dtype)
    if dtype not in WEIGHT_DTYPES:
        raise UserError(f"there is no weight dtype {dtype!r}; take one of {', '.join(WEIGHT_DTYPES)}.")
    if not tensor.is_matrix:
        return tensor.size * _BYTES["float32"]
    if dtype in _BYTES:
        return tensor.size * _BYTES[dtype]
    inputs = tensor.shape[tensor.in_axis]
    outputs = tensor.size // inputs
    if dtype == "int4" and tensor.component not in ("embedding", "head", "router"):
        return outputs * (math.ceil(inputs / 2) + math.ceil(inputs / _GROUP) * _SCALE_BYTES)
    return outputs * (inputs + math.ceil(inputs / group_of_8_bits) * _SCALE_BYTES)


def weight_bytes(config: ModelConfig, dtype: str) -> int:
    """The bytes of all weights in memory; `dtype` is one of WEIGHT_DTYPES.

    int8 is w8a16, matrices by 8 bits in groups of 64 inputs with a float16 scale (w8a8: of 32); int4 is w4a16, 4 bits
    by groups of 32 (w4a8 too), but embedding, head and router as in w8a16 (in w8a8). All else is float32.
    """
    return sum(tensor_bytes(tensor, dtype) for tensor in _tensors(config))


def weight_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """The bytes of weights that one decoded token reads: one row of lookup tables, the chosen experts."""
    total = 0.0
    for tensor in _tensors(config):
        size: float = tensor_bytes(tensor, dtype)
        if tensor.component == "position" or (tensor.component == "embedding" and not config.tie_word_embeddings):
            size /= tensor.shape[0]
        elif tensor.component == "experts":
            size *= _active_experts(config)
        total += size
    return round(total)


def kv_bytes_per_token(config: ModelConfig, dtype: str = "float32") -> int:
    """The bytes of keys and values one token leaves in the cache: attention layers only."""
    if dtype not in KV_DTYPES:
        raise UserError(f"there is no KV cache dtype {dtype!r}; take one of {', '.join(KV_DTYPES)}.")
    # int8 has a float32 scale for each head's keys and values of a token.
    head = config.head_dim + _BYTES["float32"] if dtype == "int8" else config.head_dim * _BYTES[dtype]
    return 2 * config.num_attention_layers * config.num_key_value_heads * head


def state_bytes_per_sequence(config: ModelConfig) -> int:
    """The float32 bytes of a sequence's Mamba layers, whatever its length: SSM states, conv windows."""
    return config.num_mamba_layers * sum(map(math.prod, config.state_shapes)) * _BYTES["float32"]


def matmul_flops_per_token(config: ModelConfig) -> int:
    """The operations of one token's matrix products, at any context: two per weight it meets."""
    flops = 0.0
    for tensor in _tensors(config):
        looked_up = tensor.component == "embedding" and not config.tie_word_embeddings
        if tensor.is_matrix and not looked_up:
            flops += 2 * tensor.size * (_active_experts(config) if tensor.component == "experts" else 1)
    return round(flops)


def attention_window(config: ModelConfig) -> int | None:
    """How many positions a token's attention sees, itself included; None where it sees all."""
    return config.sliding_window if isinstance(config, LlamaConfig) else None


def attention_flops_per_position(config: ModelConfig) -> int:
    """The operations that each earlier position adds to one token: its scores and its share of the values."""
    return 4 * config.num_attention_layers * config.num_attention_heads * config.head_dim
