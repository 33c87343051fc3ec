"""What a config implies: parameters, bytes and operations, by the shapes of its tensors.

The arithmetic that is the same for all families; it never sees an array, so a model can be measured without weights.
"""

import math
from functools import lru_cache

from tinyserve.errors import UserError
from tinyserve.models.config.base import ATTENTION, MAMBA, ModelConfig
from tinyserve.models.config.shapes import COMPONENTS, TensorShape
from tinyserve.models.dtypes import KV_CACHE_DTYPES, SCALE_BYTES, WEIGHT_DTYPES, weight_dtype

_FLOAT32_BYTES = 4


@lru_cache(maxsize=64)
def _tensors(config: ModelConfig, layers: range | None = None) -> tuple[TensorShape, ...]:
    return tuple(config.tensor_shapes(layers))


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
    """The bytes of one tensor in memory; raises UserError for a dtype that does not exist."""
    kind = weight_dtype(dtype)
    if not tensor.is_matrix:
        return tensor.size * _FLOAT32_BYTES
    if tensor.component in ("embedding", "head", "router"):
        kind = WEIGHT_DTYPES[kind.at_least_8_bits]
    if not kind.is_integer:
        return tensor.size * kind.weight_bits // 8
    inputs = tensor.shape[tensor.in_axis]
    per_output = math.ceil(inputs * kind.weight_bits / 8) + math.ceil(inputs / kind.group_size) * SCALE_BYTES
    return tensor.size // inputs * per_output


def weight_bytes(config: ModelConfig, dtype: str, layers: range | None = None) -> int:
    """The bytes of all weights in memory, or of a slice that has some `layers`.

    Matrices are kept in the dtype, by groups of inputs with a float16 scale each where it is one of integers (models/
    dtypes.py); embedding, head and router have 8 bits where others have 4. All else is float32.
    """
    return sum(tensor_bytes(tensor, dtype) for tensor in _tensors(config, layers))


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


def kv_bytes_per_token(config: ModelConfig, dtype: str = "float32", layers: range | None = None) -> int:
    """The bytes of keys and values one token leaves in the cache: attention layers only, of all or of some `layers`."""
    if dtype not in KV_CACHE_DTYPES:
        raise UserError(f"there is no KV cache dtype {dtype!r}; take one of {', '.join(KV_CACHE_DTYPES)}.")
    head = KV_CACHE_DTYPES[dtype].head_bytes(config.head_dim)
    return 2 * config.count_layers(ATTENTION, layers) * config.num_key_value_heads * head


def state_bytes_per_sequence(config: ModelConfig, layers: range | None = None) -> int:
    """The float32 bytes of a sequence's Mamba layers, whatever its length: SSM states, conv windows."""
    return config.count_layers(MAMBA, layers) * sum(map(math.prod, config.state_shapes)) * _FLOAT32_BYTES


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
