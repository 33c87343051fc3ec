"""What a config implies: parameters, bytes and operations, by the shapes of its tensors.

The arithmetic that is the same for all families; it never sees an array, so a model can be measured without weights.
"""

import math
from functools import lru_cache
from typing import Final

from tinyserve.errors import UserError
from tinyserve.models.config.base import ModelConfig
from tinyserve.models.config.shapes import COMPONENTS, TensorShape

WEIGHT_DTYPES: Final = ("float32", "bfloat16", "int8", "int4")
KV_DTYPES: Final = ("float32", "bfloat16", "int8")

_SHORT: Final = {"w8a16": "int8", "w8a8": "int8", "w4a16": "int4", "w4a8": "int4"}
_BYTES: Final = {"float32": 4, "bfloat16": 2}
# A float16 scale for so many inputs; beside 16-bit activations, 8 bits need fewer.
_GROUP, _WIDE_GROUP, _SCALE_BYTES = 32, 64, 2


@lru_cache(maxsize=64)
def _tensors(config: ModelConfig) -> tuple[TensorShape, ...]:
    return tuple(config.tensor_shapes())


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
    return parameter_count(config) - idle + int(idle * config.active_experts)


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
            size *= config.active_experts
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
            flops += 2 * tensor.size * (config.active_experts if tensor.component == "experts" else 1)
    return round(flops)


def attention_flops_per_position(config: ModelConfig) -> int:
    """The operations that each earlier position adds to one token: its scores and its share of the values."""
    return 4 * config.num_attention_layers * config.num_attention_heads * config.head_dim
