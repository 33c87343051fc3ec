"""Which layers a slice of a model has, and what fits beside it: ranges of equal bytes, the embedding and head counted.

Ints only: it knows what a config implies, and neither arrays nor processes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tinyserve.errors import UserError
from tinyserve.models.config import ModelConfig, costs
from tinyserve.models.dtypes import resolve_kv_cache_dtype
from tinyserve.progress import size

if TYPE_CHECKING:
    from tinyserve.models.cache_plan import CacheNeeds


def partition(config: ModelConfig, dtype: str, count: int) -> list[range]:
    """The layers of each of `count` slices, of bytes as equal as can be. Raises UserError for more than there are."""
    if count > config.num_hidden_layers:
        raise UserError(
            f"pipeline_parallel_size is {count}, and the model has {config.num_hidden_layers} layers, of which each "
            "slice has one at least: give a smaller one."
        )
    return equal_ranges(layer_bytes(config, dtype), count)


def layer_bytes(config: ModelConfig, dtype: str) -> list[int]:
    """The bytes of each layer's weights, with what stands before the first and behind the last."""
    nbytes = [0] * config.num_hidden_layers
    for tensor in config.tensor_shapes():
        for layer in config.layers_of(tensor):
            nbytes[layer] += costs.tensor_bytes(tensor, dtype)
    return nbytes


def equal_ranges(weights: Sequence[int], count: int) -> list[range]:
    """Cut `weights` into `count` ranges, none of them empty, of which the heaviest is as light as it can be."""
    low, high = max(weights), sum(weights)
    while low < high:
        limit = (low + high) // 2
        if len(_filled(weights, limit)) <= count:
            high = limit
        else:
            low = limit + 1
    return _filled(weights, low, count)


def _filled(weights: Sequence[int], limit: int, count: int = 1) -> list[range]:
    """Ranges that are filled up to a limit, one after the other; early enough ended that there are `count` at least."""
    ranges, start, weight = list[range](), 0, 0
    for i, one in enumerate(weights):
        left, wanted = len(weights) - i, count - len(ranges)  # layers and ranges, this one among them
        if i > start and (weight + one > limit or left < wanted):
            ranges.append(range(start, i))
            start, weight = i, 0
        weight += one
    return [*ranges, range(start, len(weights))]


def network_bytes(config: ModelConfig, count: int) -> int:
    """The bytes that cross the network for a token: from each slice to the next its residual stream, float32 as it is.

    Any rounding would change bits. What else goes to each slice are the ints of a step, a few kilobytes.
    """
    return (count - 1) * config.hidden_size * 4


def described(config: ModelConfig, count: int, dtypes: Sequence[str]) -> dict[str, Any]:
    """What each slice holds in each of these dtypes, and what crosses the network, as plain data. Raises UserError."""
    return {
        "pipeline_parallel_size": count,
        "network_bytes_per_token": network_bytes(config, count),
        "slices": {
            dtype: [
                {
                    "first_layer": layers.start,
                    "last_layer": layers.stop - 1,
                    "weight_bytes": costs.weight_bytes(config, dtype, layers),
                    "kv_bytes_per_token": costs.kv_bytes_per_token(
                        config, resolve_kv_cache_dtype("auto", dtype), layers
                    ),
                    "state_bytes_per_sequence": costs.state_bytes_per_sequence(config, layers),
                }
                for layers in partition(config, dtype, count)
            ]
            for dtype in dtypes
        },
    }


class Place(NamedTuple):
    """Where a slice is: a machine's name, and the bytes that are free there."""

    node: str
    free: int


def cache_memory(needs: "Sequence[CacheNeeds]", places: Sequence[Place]) -> int:
    """The bytes that all caches may take together, so that on no machine more than half of what is left is taken.

    `needs` are of the slices, and of a draft model beside one of them, and `places` are where they are. Raises
    UserError for a machine that has no room for the weights.
    """
    budgets = list[int]()
    for node, free in {place.node: place.free for place in places}.items():
        here = [need for need, place in zip(needs, places, strict=True) if place.node == node]
        weights = sum(need.weight_nbytes for need in here)
        if weights > free:
            raise UserError(
                f"The weights on {node} take {size(weights)}, and it has {size(free)} free: free some memory there, "
                "raise pipeline_parallel_size on more machines, or take a dtype of fewer bits."
            )
        if part := part_of(here, needs):
            budgets.append(int((free - weights) // 2 / part))
    return min(budgets, default=0)


def part_of(some: "Sequence[CacheNeeds]", needs: "Sequence[CacheNeeds]") -> float:
    """The part of all caches that those of some of the slices are: of blocks or of states, whichever is larger."""
    blocks, states = (
        [sum(getattr(need, name) for need in each) for each in (some, needs)]
        for name in ("block_nbytes", "state_nbytes")
    )
    return max((here / whole for here, whole in (blocks, states) if whole), default=0.0)
