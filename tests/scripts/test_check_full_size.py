"""The script that compares full sizes, on tiny ones; and its table."""

import sys
from pathlib import Path

import checkpoints
import pytest
from oracles import Oracle

from tinyserve.checkpoints import presets

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import check_full_size


@pytest.mark.parametrize("name", ["gpt2", "falcon-40b", "falcon-rw", "llama-3", "granite-hybrid"])
def test_a_comparison(name: str, oracle: Oracle) -> None:
    oracle("torch")
    oracle("transformers")
    result = check_full_size.compare(checkpoints.CONFIGS[name], layers=2, tokens=20)
    assert result.layers == 2
    assert result.largest > 0.1
    assert 0 < result.difference <= check_full_size.TOLERANCE


def test_the_table_is_of_presets() -> None:
    for name, layers in check_full_size.LAYERS.items():
        raw = presets.get(name).raw_config
        assert (check_full_size.with_layers(raw, layers) == raw) == (layers is None)


def test_layers_are_the_first_ones() -> None:
    hybrid = presets.get("granite-350m").raw_config
    raw = check_full_size.with_layers(hybrid, 11)
    assert raw["num_hidden_layers"] == 11
    assert raw["layer_types"] == hybrid["layer_types"][:11]
