"""The presets: every one parses, says where it is from, and owns up to what nobody has checked."""

import json
import re
import subprocess
import sys
from importlib.resources import files

import pytest

from tinyserve.checkpoints import presets
from tinyserve.errors import UnknownModelError
from tinyserve.models.config import RopeParameters, preset_config
from tinyserve.models.config.costs import parameter_count
from tinyserve.models.config.falcon import FalconConfig
from tinyserve.models.config.granite import GraniteConfig
from tinyserve.models.config.llama import LlamaConfig

pytestmark = pytest.mark.fast

NAMES = [
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "falcon-7b",
    "falcon-7b-instruct",
    "falcon-40b",
    "falcon-rw-1b",
    "llama-7b",
    "llama-13b",
    "llama-3.1-8b",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "tinyllama-1.1b",
    "smollm2-135m",
    "smollm2-360m",
    "smollm2-1.7b",
    "mistral-7b",
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "qwen3-1.7b",
    "granite-350m",
    "granite-1b",
    "granite-4.0-350m",
    "granite-4.0-1b",
    "granite-4.0-h-tiny",
    "granite-3.0-1b-a400m",
]
ZOO = ["tiny-gpt2", "tiny-falcon", "tiny-llama", "tiny-granite", "tinier-llama"]
# name: layers, hidden, heads, key-value heads, head_dim, intermediate, vocabulary, context
SIZES = {
    "gpt2": (12, 768, 12, 12, 64, 3072, 50257, 1024),
    "gpt2-xl": (48, 1600, 25, 25, 64, 6400, 50257, 1024),
    "falcon-7b": (32, 4544, 71, 1, 64, 18176, 65024, 2048),
    "falcon-40b": (60, 8192, 128, 8, 64, 32768, 65024, 2048),
    "falcon-rw-1b": (24, 2048, 32, 32, 64, 8192, 50304, 2048),
    "llama-7b": (32, 4096, 32, 32, 128, 11008, 32000, 4096),
    "llama-13b": (40, 5120, 40, 40, 128, 13824, 32000, 4096),
    "llama-3.1-8b": (32, 4096, 32, 8, 128, 14336, 128256, 131072),
    "llama-3.2-3b": (28, 3072, 24, 8, 128, 8192, 128256, 131072),
    "tinyllama-1.1b": (22, 2048, 32, 4, 64, 5632, 32000, 2048),
    "smollm2-135m": (30, 576, 9, 3, 64, 1536, 49152, 8192),
    "mistral-7b": (32, 4096, 32, 8, 128, 14336, 32768, 32768),
    "qwen2.5-0.5b": (24, 896, 14, 2, 64, 4864, 151936, 32768),
    "qwen3-0.6b": (28, 1024, 16, 8, 128, 3072, 151936, 40960),
    "qwen3-1.7b": (28, 2048, 16, 8, 128, 6144, 151936, 40960),
    "granite-350m": (32, 768, 12, 4, 64, 2048, 100352, 32768),
    "granite-1b": (40, 1536, 12, 4, 128, 4096, 100352, 131072),
    "granite-4.0-350m": (28, 1024, 16, 4, 64, 2048, 100352, 32768),
    "granite-4.0-1b": (40, 2048, 16, 4, 128, 4096, 100352, 131072),
    "granite-4.0-h-tiny": (40, 1536, 12, 4, 128, 512, 100352, 131072),
    "granite-3.0-1b-a400m": (24, 1024, 16, 8, 64, 512, 49155, 4096),
}
# name: attention layers; the embedding, attention and residual multipliers and the logits scaling;
#       experts, chosen ones, shared MLP
GRANITES = {
    "granite-350m": ([10, 13, 17, 27], (12, 0.015625, 0.246, 3), (0, 0, 2048)),
    "granite-1b": ([5, 15, 25, 35], (12, 0.0078125, None, None), (0, 0, 4096)),
    "granite-4.0-h-tiny": ([5, 15, 25, 35], (12, 0.0078125, None, 6), (64, 6, 1024)),
    "granite-4.0-350m": (list(range(28)), (12, 0.015625, 0.263, 4), (0, 0, 2048)),
    "granite-4.0-1b": (list(range(40)), (12, 0.0078125, 0.22, 8), (0, 0, 4096)),
    "granite-3.0-1b-a400m": (list(range(24)), (12, 0.015625, 0.22, 6), (32, 8, 0)),
}


def granite(name: str) -> GraniteConfig:
    config = preset_config(name)
    assert isinstance(config, GraniteConfig)
    return config


def test_the_names() -> None:
    assert presets.names() == sorted(NAMES + ZOO)
    assert presets.DEFAULT in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_complete_and_honest(name: str) -> None:
    preset = presets.get(name)
    assert preset.name == name
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", preset.repo)
    assert re.fullmatch(r"[0-9a-f]{40}", preset.revision) or (
        preset.revision == "main" and "revision" in preset.unverified
    )
    assert preset.license
    assert preset_config(preset.name).num_hidden_layers > 0
    keys = set(preset.raw_config) | {"revision", "gated", "repo", "license", "generation_config"}
    assert set(preset.unverified) <= keys, "an unverified key that is not there"


def test_the_files_hold_these_keys_and_no_others() -> None:
    keys = ["repo", "revision", "family", "variant", "gated", "chat", "license", "unverified"]
    keys += ["parameters", "generation_config", "config"]
    for file in files(presets).iterdir():
        if file.name.endswith(".json"):
            found = list(json.loads(file.read_text()))
            if file.name.removesuffix(".json") in ZOO:
                assert found == ["zoo", *keys[2:9]], file.name
                continue
            assert found == [key for key in keys if key in found or key != "generation_config"], file.name


@pytest.mark.parametrize("name", ZOO)
def test_a_preset_of_the_zoo_is_in_the_package(name: str) -> None:
    preset = presets.get(name)
    assert preset.folder is not None and preset.folder.name == name
    assert (preset.repo, preset.revision, preset.chat, preset.gated) == ("", "", False, False)
    assert json.loads((preset.folder / "config.json").read_text()) == preset.raw_config
    assert preset.source == str(preset.folder / "config.json")
    assert presets.in_zoo(preset.family) == name or name == "tinier-llama"


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    config = preset_config(name)
    assert SIZES[name] == (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.intermediate_size,
        config.vocab_size,
        config.max_position_embeddings,
    )


@pytest.mark.parametrize("name", GRANITES)
def test_granite_layers_multipliers_and_experts(name: str) -> None:
    """What is None here is unverified upstream, so the preset must say that it is."""
    config = granite(name)
    attention, multipliers, mixture = GRANITES[name]
    assert [i for i, kind in enumerate(config.layer_types) if kind == "attention"] == attention
    fields = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    for field, value in zip(fields, multipliers, strict=True):
        if value is None:
            assert field in presets.get(name).unverified
        else:
            assert getattr(config, field) == value
    assert mixture == (config.num_local_experts, config.num_experts_per_tok, config.shared_intermediate_size)
    assert config.tie_word_embeddings


def test_granite_positions_and_states() -> None:
    for name, d_head in (("granite-350m", 32), ("granite-1b", 64), ("granite-4.0-h-tiny", 64)):
        config = granite(name)
        assert config.rope is None
        assert (config.mamba_n_heads, config.mamba_d_head, config.mamba_d_state) == (48, d_head, 128)
        assert (config.mamba_d_conv, config.mamba_n_groups) == (4, 1)
    assert granite("granite-4.0-350m").rope == RopeParameters(1e7)
    assert granite("granite-3.0-1b-a400m").rope == RopeParameters(1e4)
    assert granite("granite-3.0-1b-a400m").rms_norm_eps == 1e-6
    assert granite("granite-350m").eos_token_ids == (100257,)
    assert granite("granite-3.0-1b-a400m").eos_token_ids == (0,)


def test_llama_positions() -> None:
    for name, factor in (("llama-3.1-8b", 8.0), ("llama-3.2-1b", 32.0), ("llama-3.2-3b", 32.0)):
        config = preset_config(name)
        assert isinstance(config, LlamaConfig)
        assert config.rope == RopeParameters(5e5, "llama3", factor, 1.0, 4.0, 8192)
        assert config.eos_token_ids == (128001, 128008, 128009)
        assert config.tie_word_embeddings == (name != "llama-3.1-8b")
    theta = {
        "llama-7b": 1e4,
        "tinyllama-1.1b": 1e4,
        "smollm2-135m": 1e5,
        "smollm2-1.7b": 1.3e5,
        "mistral-7b": 1e6,
    }
    for name, base in theta.items():
        config = preset_config(name)
        assert isinstance(config, LlamaConfig)
        assert config.rope == RopeParameters(base)
        assert config.sliding_window is None


def test_falcon_blocks() -> None:
    styles = {
        "falcon-7b": (True, False, True, 1, False, False),
        "falcon-7b-instruct": (True, False, True, 1, False, False),
        "falcon-40b": (True, True, True, 2, False, False),
        "falcon-rw-1b": (False, False, False, 1, True, True),
    }
    for name, style in styles.items():
        config = preset_config(name)
        assert isinstance(config, FalconConfig)
        assert style == (
            config.multi_query,
            config.new_decoder_architecture,
            config.parallel_attn,
            config.num_ln_in_parallel_attn,
            config.bias,
            config.alibi,
        )
        assert (config.rope is None) == config.alibi


def test_variants_are_the_family_by_size() -> None:
    assert presets.variants("gpt2") == {
        "tiny": "tiny-gpt2",
        "small": "gpt2",
        "medium": "gpt2-medium",
        "large": "gpt2-large",
        "xl": "gpt2-xl",
    }
    assert list(presets.variants("gpt2")) == ["tiny", "small", "medium", "large", "xl"]
    assert list(presets.variants("falcon")) == ["tiny", "rw-1b", "7b", "7b-instruct", "40b"]
    assert list(presets.variants("granite").values())[:2] == ["tiny-granite", "granite-350m"]
    assert list(presets.variants("llama"))[:2] == ["tinier", "tiny"]
    assert presets.in_zoo("qwen") is None
    assert list(presets.variants("qwen")) == ["2.5-0.5b", "3-0.6b", "3-1.7b"]
    assert presets.variants("gemma") == {}
    families = {presets.get(name).family for name in NAMES}
    assert sum(len(presets.variants(family)) for family in families) == len(NAMES + ZOO)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("gtp2", "gpt2"),
        ("granite-35m", "granite-350m"),
        ("SmolLM2-135M", "smollm2-135m"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m"),
        ("falcon7b", "falcon-7b"),
    ],
)
def test_an_unknown_model_is_answered_with_the_nearest(typed: str, meant: str) -> None:
    assert presets.find(typed) is None
    assert presets.nearest(typed)[0] == meant
    with pytest.raises(UnknownModelError) as error:
        presets.get(typed)
    assert f"Did you mean {meant}" in str(error.value)
    assert "tinyllama-1.1b" in str(error.value)  # the list of presets
    assert error.value.exit_code == 2


def test_nothing_is_near_to_nonsense() -> None:
    assert presets.nearest("zzzzzz") == []
    assert "Did you mean" not in str(presets.unknown_model("zzzzzz"))


@pytest.mark.parametrize("name", ["../presets/gpt2", "gpt2.json", "", ".", "__init__"])
def test_only_names_are_names(name: str) -> None:
    assert presets.find(name) is None


def test_importing_presets_needs_neither_numpy_nor_numba() -> None:
    script = "import sys, tinyserve.checkpoints.presets; print({'numpy', 'numba', 'rich'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"


@pytest.mark.parametrize("name", NAMES + ZOO)
def test_the_number_of_parameters_is_that_of_the_config(name: str) -> None:
    assert presets.get(name).parameters == parameter_count(preset_config(name))
