"""Reading config.json: both dialects give one answer, and what is wrong is refused by file, key and value."""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyserve.errors import ConfigError
from tinyserve.models import registry
from tinyserve.models.config import RopeParameters, parse_config
from tinyserve.models.config.falcon import FalconConfig
from tinyserve.models.config.gpt2 import GPT2Config
from tinyserve.models.config.granite import GraniteConfig
from tinyserve.models.config.llama import LlamaConfig
from tinyserve.models.config.qwen import QwenConfig

pytestmark = pytest.mark.fast

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}
FALCON = {
    "model_type": "falcon",
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "num_kv_heads": 71,
    "multi_query": True,
    "new_decoder_architecture": False,
    "parallel_attn": True,
}
GRANITE = LLAMA | {
    "model_type": "granite",
    "embedding_multiplier": 12,
    "attention_multiplier": 0.015625,
    "residual_multiplier": 0.22,
    "logits_scaling": 8,
}
HYBRID = GRANITE | {
    "model_type": "granitemoehybrid",
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "layer_types": ["mamba", "attention", "mamba", "mamba"],
    "shared_intermediate_size": 2048,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "mamba_n_heads": 48,
    "mamba_d_head": 32,
    "mamba_d_state": 128,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "position_embedding_type": "nope",
}
QWEN2, QWEN3 = LLAMA | {"model_type": "qwen2"}, LLAMA | {"model_type": "qwen3", "head_dim": 128}
EVERY = {
    "gpt2": GPT2, "llama": LLAMA, "falcon": FALCON, "granite": GRANITE, "hybrid": HYBRID, "qwen2": QWEN2,
    "qwen3": QWEN3,
}  # fmt: skip
REQUIRED = {
    "gpt2": list(GPT2),
    "llama": [key for key in LLAMA if key not in ("num_key_value_heads", "rms_norm_eps")],
    "falcon": ["model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"],
    "hybrid": [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "mamba_n_heads",
        "mamba_d_state",
    ],
}


def test_every_family_answers_every_question_itself() -> None:
    """What is abstract has no answer for all, so that nothing falls back silently for a family that does not say."""
    for family in registry.FAMILIES:
        config = family.config_class()
        assert not getattr(config, "__abstractmethods__", None), family
        for question in ("parse", "from_gguf", "backbone_shapes", "attention_window", "describe"):
            assert question in vars(config), (family, question)
    named = [name for family in registry.FAMILIES for name in family.model_types]
    assert len(set(named)) == len(named)


def test_nobody_else_tells_families_apart() -> None:
    """A comparison of `model_type`, or a match on a config's class, is a question that the config should answer."""
    package = Path(registry.__file__).parents[1]
    classes = {family.config for family in registry.FAMILIES}
    own = {package / "models" / f"{family.module}.py" for family in registry.FAMILIES}
    for path in set(package.rglob("*.py")) - set((package / "models" / "config").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                compared = [node.left, *node.comparators]
                assert not any(isinstance(one, ast.Attribute) and one.attr == "model_type" for one in compared), path
            assert not (isinstance(node, ast.Name) and node.id in classes and path not in own), path


def test_a_family_is_imported_when_it_is_asked_for() -> None:
    script = (
        "import sys, tinyserve.models\n"
        "from tinyserve.models.config import parse_config\n"
        f"parse_config({GPT2!r})\n"
        "print(sorted(name for name in sys.modules if name in ('numpy', 'numba') or name.endswith(('gpt2', 'llama'))))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "['tinyserve.models.config.gpt2']"


def without(raw: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key not in keys}


def required_keys() -> list[tuple[str, str]]:
    return [(family, key) for family, keys in REQUIRED.items() for key in keys]


def test_gpt2_has_the_names_of_today_and_the_defaults_of_transformers() -> None:
    config = parse_config(GPT2)
    assert isinstance(config, GPT2Config)
    assert (config.hidden_size, config.num_hidden_layers, config.max_position_embeddings) == (768, 12, 1024)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (12, 12, 64)
    assert config.intermediate_size == 3072
    assert parse_config(GPT2 | {"n_inner": 100}).intermediate_size == 100
    assert config.activation_function == "gelu_new"
    assert config.layer_norm_epsilon == 1e-5
    assert config.scale_attn_weights
    assert not config.scale_attn_by_inverse_layer_idx
    assert config.tie_word_embeddings
    assert config.bos_token_id == 50256
    assert config.eos_token_ids == (50256,)
    assert config.layer_types == ("attention",) * 12


@pytest.mark.parametrize(("family", "key"), required_keys())
@pytest.mark.parametrize("null", [False, True])
def test_a_missing_key_is_named_with_its_file(family: str, key: str, null: bool) -> None:
    raw = without(EVERY[family], key) | ({key: None} if null else {})
    with pytest.raises(ConfigError, match=r"weights/config\.json: the required key") as error:
        parse_config(raw, "weights/config.json")
    assert repr(key) in str(error.value)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("value", ["12", 12.0, True, -1, 0, [12]])
def test_a_size_of_the_wrong_kind_is_refused_with_its_value(family: str, value: object) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: 'vocab_size' must be") as error:
        parse_config(EVERY[family] | {"vocab_size": value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("gpt2", "activation_function", "relu"),
        ("llama", "hidden_act", "gelu"),
        ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("qwen3", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("qwen2", "layer_types", ["sliding_attention"] * 28),
        ("qwen2", "layer_types", ["full_attention"] * 27),
        ("qwen3", "hidden_act", "gelu"),
        ("llama", "rope_parameters", {"rope_type": "longrope", "rope_theta": 1e4}),
        ("falcon", "activation", "relu"),
        ("granite", "hidden_act", "relu"),
        ("hybrid", "position_embedding_type", "learned"),
        ("hybrid", "layer_types", ["mamba", "attention", "mamba", "conv"]),
        ("hybrid", "layer_types", ["mamba"]),
        ("hybrid", "time_step_limit", [1.0]),
        ("hybrid", "time_step_limit", [0.5, 0.1]),
        ("llama", "layer_types", ["sliding_attention"] * 28),
        ("llama", "model_type", "gemma"),
        ("llama", "architectures", ["LlamaForSequenceClassification"]),
        ("llama", "quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("llama", "tie_word_embeddings", "yes"),
        ("llama", "eos_token_id", ["</s>"]),
        ("llama", "rms_norm_eps", "small"),
        ("llama", "rms_norm_eps", float("nan")),
        ("gpt2", "add_cross_attention", True),
        ("falcon", "num_ln_in_parallel_attn", 2),
        ("falcon", "num_ln_in_parallel_attn", 3),
        ("falcon", "activation", "gelu_new"),
        ("falcon", "rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("falcon", "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        ("falcon", "head_dim", 32),
        ("gpt2", "head_dim", 32),
        ("gpt2", "n_head", 7),
        ("gpt2", "is_encoder_decoder", True),
        ("llama", "compression_config", {"quant_method": "compressed-tensors"}),
        ("granite", "position_embedding_type", "nope"),
        ("hybrid", "normalization_function", "layernorm"),
        *((family, "rope_scaling", {"rope_type": "yarn", "factor": 4.0}) for family in EVERY),
        *((family, "quantization_config", {"quant_method": "awq"}) for family in EVERY),
        *((family, "quantization_config", {"bits": 4}) for family in EVERY),
    ],
)
def test_what_is_not_supported_is_refused_by_key(family: str, key: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(EVERY[family] | {key: value}, "x/config.json")
    message = str(error.value)
    assert message.startswith("x/config.json")
    assert repr(key) in message
    if isinstance(value, dict):  # what of it is refused: the kind
        value = value.get("rope_type", value.get("type", value.get("quant_method")))
    if not isinstance(value, list | bool):
        assert str(value) in message
    assert message.endswith(".")


def test_the_unsupported_names_what_is_supported() -> None:
    with pytest.raises(ConfigError, match="'gemma', which is not supported; supported: gpt2, falcon") as error:
        parse_config(LLAMA | {"model_type": "gemma"})
    assert "granitemoehybrid" in str(error.value)
    with pytest.raises(ConfigError, match="'gptq'"):
        parse_config(LLAMA | {"quantization_config": {"quant_method": "gptq"}})
    assert parse_config(LLAMA | {"quantization_config": None}) == parse_config(LLAMA)


def test_heads_that_do_not_divide_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match="3072 is not a multiple of the 7 attention heads"):
        parse_config(LLAMA | {"num_attention_heads": 7, "num_key_value_heads": 7})
    with pytest.raises(ConfigError, match="24 is not a multiple of the 5 key-value heads"):
        parse_config(LLAMA | {"num_key_value_heads": 5})
    with pytest.raises(
        ConfigError, match=r"'n_embd' 768 is not a multiple of the 7 attention heads \('n_head'\)"
    ) as error:
        parse_config(GPT2 | {"n_head": 7})
    assert "head_dim" not in str(error.value)  # which would not help
    assert parse_config(GPT2 | {"head_dim": 64}) == parse_config(GPT2)
    explicit = parse_config(LLAMA | {"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 128})
    assert explicit.head_dim == 128


def test_rope_has_two_dialects_and_one_meaning() -> None:
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = RopeParameters(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)
    for spelled in ("type", "rope_type"):
        named = scaling | {spelled: "llama3"}
        for raw in (
            {"rope_theta": 500000.0, "rope_scaling": named},
            {"rope_theta": 500000, "rope_parameters": named},
            {"rope_scaling": None, "rope_parameters": named | {"rope_theta": 500000.0}},
        ):
            config = parse_config(LLAMA | raw)
            assert isinstance(config, LlamaConfig)
            assert config.rope == expected
    plain = parse_config(LLAMA)
    assert isinstance(plain, LlamaConfig)
    assert plain.rope == RopeParameters(10000.0)
    linear = parse_config(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert isinstance(linear, LlamaConfig)
    assert linear.rope == RopeParameters(10000.0, "linear", 2.0)


def test_llama3_scaling_needs_its_factors() -> None:
    with pytest.raises(ConfigError, match=r"in 'rope_scaling': the required key 'low_freq_factor'"):
        parse_config(LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}})
    with pytest.raises(ConfigError, match=r"'partial_rotary_factor' is 0\.5"):
        parse_config(LLAMA | {"partial_rotary_factor": 0.5})


def test_end_of_text_is_an_int_a_list_or_nothing() -> None:
    assert parse_config(LLAMA | {"eos_token_id": 7}).eos_token_ids == (7,)
    assert parse_config(LLAMA | {"eos_token_id": [128001, 128008, 128009, 128001]}).eos_token_ids == (
        128001,
        128008,
        128009,
    )
    assert parse_config(LLAMA | {"eos_token_id": None}).eos_token_ids == ()
    assert parse_config(LLAMA).eos_token_ids == (2,)
    assert parse_config(LLAMA | {"bos_token_id": None}).bos_token_id is None
    assert parse_config(LLAMA).bos_token_id == 1


def test_qwen2_has_biases_on_queries_keys_and_values_alone() -> None:
    for said in ({}, {"attention_bias": False}, {"attention_bias": True}):
        config = parse_config(QWEN2 | said)
        assert isinstance(config, QwenConfig)
        assert (config.qkv_bias, config.output_bias, config.qk_norm) == (True, False, False)
    assert config.head_dim == LLAMA["hidden_size"] // LLAMA["num_attention_heads"]
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_qwen3_has_norms_and_biases_only_where_it_says_so() -> None:
    for bias in (False, True):
        config = parse_config(QWEN3 | {"attention_bias": bias})
        assert isinstance(config, QwenConfig)
        assert (config.qkv_bias, config.output_bias, config.qk_norm) == (bias, bias, True)
    assert parse_config(without(QWEN3, "head_dim")).head_dim == 128  # transformers' own default
    with pytest.raises(ConfigError, match="not a multiple of the 32 key-value heads"):
        parse_config(without(QWEN3, "num_key_value_heads"))
    assert parse_config(QWEN3 | {"num_key_value_heads": None}).num_key_value_heads == LLAMA["num_attention_heads"]


@pytest.mark.parametrize(
    ("said", "window"),
    [
        ({"sliding_window": 512, "max_window_layers": 0}, None),  # off, unless it is asked for
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 4096),
        ({"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 28}, None),
        ({"use_sliding_window": True, "sliding_window": 512}, None),  # the first 28 of 28 layers see all
        ({"use_sliding_window": True, "sliding_window": 512, "layer_types": ["sliding_attention"] * 28}, 512),
        ({"use_sliding_window": True, "sliding_window": 512, "layer_types": ["full_attention"] * 28}, None),
    ],
)
def test_qwen_has_a_window_of_all_layers_or_none(said: dict[str, Any], window: int | None) -> None:
    for raw in (QWEN2, QWEN3):
        assert parse_config(raw | said).attention_window == window


def test_a_window_of_some_layers_is_refused_by_key() -> None:
    windowed = QWEN2 | {"use_sliding_window": True, "sliding_window": 512}
    with pytest.raises(ConfigError, match=r"'max_window_layers' is 21: with 'use_sliding_window' the other 7 layers"):
        parse_config(windowed | {"max_window_layers": 21})
    mixed = ["full_attention", "sliding_attention"] * 14
    with pytest.raises(ConfigError, match=r"'layer_types' has full_attention, sliding_attention; supported"):
        parse_config(windowed | {"layer_types": mixed})


def test_mistral_has_a_window_and_no_biases() -> None:
    mistral = without(LLAMA, "num_key_value_heads") | {"model_type": "mistral", "attention_bias": True}
    config = parse_config(mistral)
    assert isinstance(config, LlamaConfig)
    assert config.num_key_value_heads == 8  # transformers' default
    assert config.sliding_window == 4096
    assert not config.attention_bias
    for off in (None, 0):
        windowless = parse_config(mistral | {"sliding_window": off, "num_key_value_heads": None})
        assert isinstance(windowless, LlamaConfig)
        assert windowless.sliding_window is None
        assert windowless.num_key_value_heads == 24
    llama = parse_config(LLAMA | {"sliding_window": 4096})
    assert isinstance(llama, LlamaConfig)
    assert llama.sliding_window is None


@pytest.mark.parametrize(
    ("changes", "kv_heads", "norms"),
    [
        ({}, 1, 1),  # 7b: writes 71 and has 1
        (
            {
                "hidden_size": 8192,
                "num_attention_heads": 128,
                "num_kv_heads": 8,
                "new_decoder_architecture": True,
            },
            8,
            2,
        ),
        ({"num_attention_heads": 64, "hidden_size": 4096, "multi_query": False, "num_kv_heads": 3}, 64, 1),
        (
            {
                "num_attention_heads": 32,
                "hidden_size": 4096,
                "num_kv_heads": 8,
                "new_decoder_architecture": True,
                "num_ln_in_parallel_attn": 1,
            },
            8,
            1,
        ),
    ],
    ids=["7b", "40b", "plain", "11b"],
)
def test_falcon_key_heads_and_norms_follow_the_block_style(
    changes: dict[str, object], kv_heads: int, norms: int
) -> None:
    config = parse_config(FALCON | changes)
    assert isinstance(config, FalconConfig)
    assert config.num_key_value_heads == kv_heads
    assert config.num_ln_in_parallel_attn == norms


def test_falcon_defaults_and_alibi() -> None:
    config = parse_config(without(FALCON, "multi_query", "parallel_attn", "new_decoder_architecture"))
    assert isinstance(config, FalconConfig)
    assert config == parse_config(FALCON)
    assert (config.layer_norm_epsilon, config.intermediate_size, config.max_position_embeddings) == (
        1e-5,
        4 * 4544,
        2048,
    )
    assert config.rope == RopeParameters(10000.0)
    assert config.tie_word_embeddings
    alibi = parse_config(FALCON | {"alibi": True})
    assert isinstance(alibi, FalconConfig)
    assert alibi.rope is None
    with pytest.raises(ConfigError, match="'parallel_attn'"):
        parse_config(FALCON | {"new_decoder_architecture": True, "parallel_attn": False})
    odd = FALCON | {"num_attention_heads": 64}
    with pytest.raises(ConfigError, match="'head_dim' is 71, but rotary positions"):
        parse_config(odd)
    assert parse_config(odd | {"alibi": True}).head_dim == 71


def test_refined_web_is_falcon_in_its_first_dialect() -> None:
    sizes = {"vocab_size": 65024, "bias": False, "alibi": False, "multi_query": True, "parallel_attn": True}
    seven = sizes | {"model_type": "RefinedWebModel", "hidden_size": 4544, "n_head": 71, "n_layer": 32}
    assert parse_config(seven) == parse_config(FALCON)
    forty = sizes | {
        "model_type": "RefinedWeb",
        "hidden_size": 8192,
        "n_head": 128,
        "n_head_kv": 8,
        "n_layer": 60,
    }
    config = parse_config(forty)
    assert isinstance(config, FalconConfig)
    assert config.model_type == "falcon"
    assert config.new_decoder_architecture
    assert config.num_key_value_heads == 8
    assert config.num_ln_in_parallel_attn == 2
    rw = sizes | {"model_type": "RefinedWeb", "hidden_size": 2048, "n_head": 32, "n_layer": 24, "alibi": True}
    config = parse_config(rw | {"multi_query": False, "parallel_attn": False, "bias": True})
    assert isinstance(config, FalconConfig)
    assert not config.new_decoder_architecture
    assert config.num_key_value_heads == 32


def test_granite_defaults_are_neutral() -> None:
    multipliers = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    config = parse_config(without(GRANITE, *multipliers))
    assert isinstance(config, GraniteConfig)
    assert [getattr(config, name) for name in multipliers] == [1.0] * 4
    assert config.rope == RopeParameters(10000.0)
    assert not config.num_local_experts
    assert not config.shared_intermediate_size


def test_zero_experts_is_a_dense_model_although_the_key_is_there() -> None:
    config = parse_config(HYBRID)
    assert isinstance(config, GraniteConfig)
    assert (config.num_local_experts, config.num_experts_per_tok) == (0, 0)
    mixture = parse_config(HYBRID | {"num_local_experts": 64, "num_experts_per_tok": 6})
    assert isinstance(mixture, GraniteConfig)
    assert (mixture.num_local_experts, mixture.num_experts_per_tok) == (64, 6)
    with pytest.raises(ConfigError, match="'num_experts_per_tok' 9 is more than the 8"):
        parse_config(HYBRID | {"num_local_experts": 8, "num_experts_per_tok": 9})
    with pytest.raises(ConfigError, match="'num_local_experts' must be at least 1"):
        parse_config(GRANITE | {"model_type": "granitemoe", "num_local_experts": 0})


def test_layer_types_have_two_dialects() -> None:
    old = parse_config(HYBRID)
    new = parse_config(
        HYBRID | {"layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"]}
    )
    assert old == new
    assert old.layer_types == ("mamba", "attention", "mamba", "mamba")
    assert (old.num_attention_layers, old.num_mamba_layers) == (1, 3)


@pytest.mark.parametrize(
    "written",
    [None, "[0.0, Infinity]", '[0.0, {"__float__": "Infinity"}]', '[0, "inf"]', "[0.0, 1e999]"],
)
def test_infinity_has_many_spellings(written: str | None) -> None:
    limit = {} if written is None else {"time_step_limit": json.loads(written)}
    config = parse_config(HYBRID | limit)
    assert isinstance(config, GraniteConfig)
    assert config.time_step_limit == (0.0, math.inf)


def test_mamba_sizes_must_agree() -> None:
    config = parse_config(HYBRID)
    assert isinstance(config, GraniteConfig)
    assert (config.mamba_intermediate_size, config.mamba_conv_dim) == (1536, 1792)
    assert parse_config(HYBRID | {"mamba_d_head": "auto"}) == config
    with pytest.raises(ConfigError, match=r"'mamba_n_heads' 48 times 'mamba_d_head' 64 is 3072.*is 1536"):
        parse_config(HYBRID | {"mamba_d_head": 64})
    with pytest.raises(ConfigError, match="'mamba_n_heads' 48 is not a multiple of 'mamba_n_groups' 5"):
        parse_config(HYBRID | {"mamba_n_groups": 5})


def test_a_hybrid_of_attention_alone_needs_no_mamba_keys_and_may_rotate() -> None:
    raw = {key: value for key, value in HYBRID.items() if not key.startswith("mamba_")}
    config = parse_config(raw | {"layer_types": ["attention"] * 4, "position_embedding_type": "rope"})
    assert isinstance(config, GraniteConfig)
    assert config.mamba_n_heads == 0
    assert config.rope == RopeParameters(10000.0)
    unplaced = parse_config(HYBRID | {"position_embedding_type": None})
    assert isinstance(unplaced, GraniteConfig)
    assert unplaced.rope is None


@given(
    family=st.sampled_from(sorted(EVERY)),
    noise=st.dictionaries(
        st.sampled_from(sorted({key for raw in EVERY.values() for key in raw} | {"rope_scaling", "head_dim"})),
        st.none()
        | st.booleans()
        | st.integers(-2, 9)
        | st.sampled_from(["", "auto", "llama", "mamba"])
        | st.lists(st.integers(), max_size=2),
        max_size=3,
    ),
)
def test_any_config_is_parsed_or_refused_in_one_sentence(family: str, noise: dict[str, object]) -> None:
    """Whatever the values, the only error is a ConfigError that starts with the file's name."""
    try:
        config = parse_config(EVERY[family] | noise, "any.json")
    except ConfigError as error:
        assert str(error).startswith("any.json: ")
    else:
        assert len(config.layer_types) == config.num_hidden_layers
        assert config.num_attention_heads % config.num_key_value_heads == 0


@pytest.mark.parametrize("raw", [[], "gpt2", None, 3])
def test_a_config_is_an_object(raw: Any) -> None:
    with pytest.raises(ConfigError, match="one JSON object"):
        parse_config(raw)


@pytest.mark.parametrize("dtype", [None, 5, ["w8a16"], "x", {}])
def test_the_dtype_of_packed_weights_must_be_one(dtype: Any) -> None:
    packed = {"quant_method": "tinyserve", "version": 2, "dtype": dtype}
    with pytest.raises(ConfigError, match=r"^x: in 'quantization_config': .*'dtype'"):
        parse_config(LLAMA | {"quantization_config": packed}, "x")


# --- numbers and ids that are none ----------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [GPT2, LLAMA, FALCON, GRANITE], ids=lambda raw: str(raw["model_type"]))
@pytest.mark.parametrize("value", [2**31, 2**63, 10**400, 1e308, math.inf, math.nan], ids=lambda value: str(value)[:9])
def test_a_number_that_no_machine_counts_to_is_refused_by_its_key(raw: dict[str, Any], value: Any) -> None:
    """At once, and not when a tuple of so many layers is made or a kernel gets it."""
    sizes = [key for key in raw if key.startswith(("n_", "num_", "hidden_", "intermediate_", "vocab_", "max_"))]
    numbers = [key for key in raw if key.startswith(("rms_", "logits_", "embedding_"))]
    for key in [*sizes, *(numbers if value not in (2**31, 2**63) else ())]:
        if key == "num_kv_heads":  # which this Falcon does not read
            continue
        with pytest.raises(ConfigError, match=f"^x: '{key}' must be .*but it is ") as caught:
            parse_config(raw | {key: value}, "x")
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("layers", [10**6, 2**31 - 1])
@pytest.mark.parametrize("raw", [GPT2, LLAMA, FALCON, GRANITE], ids=lambda raw: str(raw["model_type"]))
def test_millions_of_layers_are_refused(raw: dict[str, Any], layers: int) -> None:
    key = "n_layer" if raw is GPT2 else "num_hidden_layers"
    with pytest.raises(ConfigError, match=f"'{key}' must be at most 4096, but it is {layers}"):
        parse_config(raw | {key: layers}, "x")


@pytest.mark.parametrize("none", [None, -1, 2**32 - 1])
def test_an_id_that_says_none_is_no_token(none: Any) -> None:
    config = parse_config(LLAMA | {"bos_token_id": none, "eos_token_id": [7, none]})
    assert (config.bos_token_id, config.eos_token_ids) == (None, (7,))
    assert parse_config(LLAMA | {"eos_token_id": none}).eos_token_ids == ()


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("scaling", [{"factor": 4.0}, {"rope_type": None, "factor": 2}, {"low_freq_factor": 4.0}])
def test_a_stretch_without_a_type_is_refused(place: str, scaling: dict[str, Any]) -> None:
    """As a plain RoPE it would give other logits without a word."""
    key = list(scaling)[-1]
    with pytest.raises(ConfigError, match=f"^x: in '{place}': '{key}' is {scaling[key]} without a 'rope_type'"):
        parse_config(LLAMA | {place: scaling}, "x")


@pytest.mark.parametrize("scaling", [{"factor": 1.0}, {"rope_type": "default", "factor": 4.0}, {"rope_theta": 5e5}, {}])
def test_what_stretches_nothing_needs_no_type(scaling: dict[str, Any]) -> None:
    config = parse_config(LLAMA | {"rope_parameters": scaling})
    assert isinstance(config, LlamaConfig)
    assert config.rope == RopeParameters(scaling.get("rope_theta", 10000.0))
