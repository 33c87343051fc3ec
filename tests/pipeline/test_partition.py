"""Layers are cut into ranges of equal bytes; what fits beside them is told by the machine that has least room."""

from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
from checkpoints import CONFIGS
from hypothesis import given
from hypothesis import strategies as st

from tinyserve.checkpoints import presets
from tinyserve.errors import UserError
from tinyserve.models.config import costs, parse_config, preset_config
from tinyserve.pipeline.partition import described, equal_ranges, layer_bytes, network_bytes, partition

pytestmark = pytest.mark.fast


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[int], int]:
    weights = draw(st.lists(st.integers(1, 1000), min_size=1, max_size=60))
    return weights, draw(st.integers(1, len(weights)))


def best(weights: list[int], count: int) -> int:
    """The least that the heaviest of so many ranges can be, by trying every cut."""
    sums = [0, *accumulate(weights)]
    least = [float("inf")] * len(sums)
    least[0] = 0
    for _ in range(count):
        least = [
            min((max(least[start], sums[end] - sums[start]) for start in range(end)), default=float("inf"))
            for end in range(len(sums))
        ]
    return int(least[-1])


@given(cuts())
def test_ranges_cover_all_layers_once_and_the_heaviest_is_as_light_as_can_be(cut: tuple[list[int], int]) -> None:
    weights, count = cut
    ranges = equal_ranges(weights, count)
    assert len(ranges) == count and all(ranges)
    assert [layer for one in ranges for layer in one] == list(range(len(weights)))
    assert all(one.stop == other.start for one, other in pairwise(ranges))
    assert max(sum(weights[one.start : one.stop]) for one in ranges) == best(weights, count)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "w4a16"])
def test_the_slices_of_a_model_have_all_its_tensors(name: str, dtype: str) -> None:
    config = parse_config(CONFIGS[name])
    whole = {tensor.name for tensor in config.tensor_shapes()}
    embedding = next(tensor for tensor in config.tensor_shapes() if tensor.component == "embedding")
    twice = costs.tensor_bytes(embedding, dtype) if config.tie_word_embeddings else 0
    for count in (1, 2, 3):
        layers = partition(config, dtype, count)
        parts = [[tensor.name for tensor in config.tensor_shapes(one)] for one in layers]
        assert set().union(*parts) == whole
        held = [costs.weight_bytes(config, dtype, one) for one in layers]
        assert sum(map(len, parts)) == len(whole) + (count > 1 and config.tie_word_embeddings)
        assert sum(held) == costs.weight_bytes(config, dtype) + twice * (count > 1)
        assert [sum(layer_bytes(config, dtype)[one.start : one.stop]) for one in layers] == held or count == 1
        assert sum(costs.kv_bytes_per_token(config, "bfloat16", one) for one in layers) == costs.kv_bytes_per_token(
            config, "bfloat16"
        )
        assert sum(costs.state_bytes_per_sequence(config, one) for one in layers) == costs.state_bytes_per_sequence(
            config
        )


def test_more_slices_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"pipeline_parallel_size is 4, and the model has 3 layers"):
        partition(parse_config(CONFIGS["llama"]), "float32", 4)


@pytest.mark.parametrize("name", presets.names())
def test_half_of_any_preset_is_little_more_than_half(name: str) -> None:
    """But for a tied embedding, which is in both, and the one layer that cannot be cut."""
    config = preset_config(name)
    for dtype in ("bfloat16", "int8", "int4"):
        whole = costs.weight_bytes(replace(config, tie_word_embeddings=False), dtype)
        heaviest = max(costs.weight_bytes(config, dtype, one) for one in partition(config, dtype, 2))
        one_layer = max(layer_bytes(config, dtype)[1:-1], default=whole / config.num_hidden_layers)
        assert heaviest <= whole / 2 + one_layer
        if not config.tie_word_embeddings and config.num_hidden_layers >= 20:
            assert heaviest <= 0.55 * whole


def test_what_is_said_of_slices() -> None:
    config = preset_config("llama-3.1-8b")
    told = described(config, 2, ["int8", "bfloat16"])
    assert told["network_bytes_per_token"] == network_bytes(config, 2) == 4 * 4096
    assert network_bytes(config, 1) == 0 and network_bytes(config, 4) == 3 * 4 * 4096
    for dtype, (first, last) in told["slices"].items():
        assert first["first_layer"] == 0 and last["last_layer"] == 31
        assert first["last_layer"] + 1 == last["first_layer"]
        assert first["weight_bytes"] + last["weight_bytes"] == costs.weight_bytes(config, dtype)
