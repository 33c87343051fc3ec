"""Granite's config: a Llama with four multipliers, optionally with experts, optionally with Mamba2 layers.

Knows only keys and values; the forward pass is tinyserve/models/granite.py.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from tinyserve.checkpoints.fields import as_float, shown
from tinyserve.errors import ConfigError
from tinyserve.models.config.base import (
    ATTENTION,
    MAMBA,
    ConfigFields,
    Description,
    ModelConfig,
    RopeParameters,
    common_fields,
)
from tinyserve.models.config.description import plural, rope_words
from tinyserve.models.config.gguf import GGUFMetadata
from tinyserve.models.config.shapes import MAX_LAYERS, TensorShape, gated_mlp, grouped_attention, linear, rms_norm

# transformers before 5 | since 5 -> ours
LAYER_TYPES = {
    "attention": ATTENTION,
    "full_attention": ATTENTION,
    "mamba": MAMBA,
    "linear_attention": MAMBA,
}


@dataclass(frozen=True, kw_only=True)
class GraniteConfig(ModelConfig):
    """Granite 3 and 4 (IBM): dense `granite`, `granitemoe`, and `granitemoehybrid`, where zero means off."""

    embedding_multiplier: float
    attention_multiplier: float  # in place of 1/sqrt(head_dim)
    residual_multiplier: float
    logits_scaling: float  # logits are divided by it
    rms_norm_eps: float
    hidden_act: str
    attention_bias: bool
    mlp_bias: bool
    rope: RopeParameters | None  # None: no positions but the order in which Mamba layers read ("nope")

    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    shared_intermediate_size: int = 0  # hybrids only: the MLP every token passes through

    mamba_n_heads: int = 0
    mamba_d_head: int = 0
    mamba_d_state: int = 0
    mamba_d_conv: int = 0
    mamba_n_groups: int = 0
    mamba_expand: int = 0
    mamba_chunk_size: int = 0
    mamba_conv_bias: bool = False
    mamba_proj_bias: bool = False
    time_step_limit: tuple[float, float] = (0.0, math.inf)

    @property
    def has_plain_mlp(self) -> bool:
        """Whether each layer has gate, up and down apart, as a Llama; else experts, a shared MLP, or both."""
        return self.model_type == "granite"

    @property
    def mamba_intermediate_size(self) -> int:
        """The width a Mamba layer works at: heads times head width."""
        return self.mamba_n_heads * self.mamba_d_head

    @property
    def mamba_conv_dim(self) -> int:
        """The channels of the convolution: x, and B and C of each group."""
        return self.mamba_intermediate_size + 2 * self.mamba_n_groups * self.mamba_d_state

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The inputs that the convolution still sees, and the SSM state, transposed as tensor/mamba2.py keeps it."""
        if not self.num_mamba_layers:
            return ()
        window = (self.mamba_d_conv - 1, self.mamba_conv_dim)
        return window, (self.mamba_n_heads, self.mamba_d_state, self.mamba_d_head)

    @classmethod
    def parse(cls, fields: ConfigFields, model_type: str) -> Self:
        """Read a config.json of any Granite; defaults are those of transformers' three classes."""
        hybrid = model_type == "granitemoehybrid"
        known: dict[str, Any] = {}
        if hybrid:
            known["layer_types"] = _layer_types(fields, fields.integer("num_hidden_layers", maximum=MAX_LAYERS))
        defaults = {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
        common = common_fields(fields, model_type, spellings={}, defaults=defaults, **known)
        rotates = _rotates(fields, ("rope", "nope") if hybrid else ("rope",))
        if rotates:
            fields.check_rotary(common["head_dim"])
        fields.choice("normalization_function", ("rmsnorm",), default="rmsnorm")
        extra: dict[str, Any] = {}
        if model_type != "granite":
            extra |= _experts(fields, minimum=0 if hybrid else 1)
        if hybrid:
            extra["shared_intermediate_size"] = fields.integer("shared_intermediate_size", default=1024)
        if MAMBA in common["layer_types"]:
            extra |= _mamba(fields, common["hidden_size"])
        return cls(
            **common,
            embedding_multiplier=fields.number("embedding_multiplier", default=1.0),
            attention_multiplier=fields.number("attention_multiplier", default=1.0),
            residual_multiplier=fields.number("residual_multiplier", default=1.0),
            logits_scaling=fields.number("logits_scaling", default=1.0),
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
            hidden_act=fields.choice("hidden_act", ("silu",), default="silu"),
            attention_bias=fields.boolean("attention_bias", default=False),
            mlp_bias=model_type == "granite" and fields.boolean("mlp_bias", default=False),
            rope=fields.rope(common["max_position_embeddings"]) if rotates else None,
            **extra,
        )

    @classmethod
    def from_gguf(cls, file: GGUFMetadata) -> dict[str, Any]:
        """Granite's three architectures: which one a file is told by its own parts, as llama.cpp tells it."""
        raw = file.decoder()
        experts, shared = file.key("expert_count", 0), file.key("expert_shared_feed_forward_length", 0)
        kv_heads = raw["num_key_value_heads"]
        if isinstance(kv_heads, list):  # one a layer; a layer without is recurrent
            kv_heads = file.integers("attention.head_count_kv")
            raw["num_key_value_heads"] = max(kv_heads, default=0)
            raw["layer_types"] = ["attention" if heads else "mamba" for heads in kv_heads]
        raw |= {
            "attention_bias": file.layers_have("attn_q.bias"),
            "mlp_bias": file.layers_have("ffn_gate.bias"),
            "embedding_multiplier": file.key("embedding_scale", 1.0),
            "attention_multiplier": file.key("attention.scale"),
            "residual_multiplier": file.key("residual_scale", 1.0),
            "logits_scaling": file.key("logit_scale", 1.0),
            "num_local_experts": experts,
            "num_experts_per_tok": file.key("expert_used_count", 0) if experts else 0,
        }
        rotates = file.key("rope.scaling.finetuned", True)
        if rotates and "mamba" not in raw.get("layer_types", ()) and not shared:
            return raw | {"model_type": "granitemoe" if experts else "granite"}
        raw |= {
            "model_type": "granitemoehybrid",
            "position_embedding_type": "rope" if rotates else "nope",
            "shared_intermediate_size": shared or raw["intermediate_size"],
            "layer_types": raw.get("layer_types") or ["attention"] * raw["num_hidden_layers"],
        }
        return raw | (_mamba_from_gguf(file) if "mamba" in raw["layer_types"] else {})

    def backbone_shapes(self) -> Iterator[TensorShape]:
        hidden = self.hidden_size
        yield TensorShape("model.embed_tokens.weight", (self.vocab_size, hidden), "embedding")
        for i, kind in enumerate(self.layer_types):
            block = f"model.layers.{i}"
            yield from rms_norm(f"{block}.input_layernorm", hidden, i)
            if kind == MAMBA:
                yield from _mamba_shapes(self, i)
            else:
                yield from grouped_attention(self, i, bias=self.attention_bias, output_bias=self.attention_bias)
            yield from rms_norm(f"{block}.post_attention_layernorm", hidden, i)
            if self.num_local_experts:
                yield from _expert_shapes(self, i)
            if self.shared_intermediate_size:
                shared = self.shared_intermediate_size  # gate above up, in one matrix
                yield from linear(f"{block}.shared_mlp.input_linear", 2 * shared, hidden, "mlp", i)
                yield from linear(f"{block}.shared_mlp.output_linear", hidden, shared, "mlp", i)
            if self.has_plain_mlp:
                yield from gated_mlp(self, i, bias=self.mlp_bias)
        yield from rms_norm("model.norm", hidden)

    @property
    def attention_window(self) -> int | None:
        return None

    @property
    def active_experts(self) -> float:
        return self.num_experts_per_tok / self.num_local_experts if self.num_local_experts else 1.0

    def describe(self) -> Description:
        block = "sequential"
        if self.num_local_experts:
            block += f", {self.num_experts_per_tok} of {self.num_local_experts} experts"
        return Description(rope_words(self.rope, otherwise="none (NoPE)"), "RMSNorm", "SwiGLU", block)

    def sizes(self) -> dict[str, str]:
        shared, mlp = self.shared_intermediate_size, f"{self.hidden_size} / {self.intermediate_size}"
        if self.num_local_experts:
            mlp += f" in each of {self.num_local_experts} experts" + f", {shared} shared" * bool(shared)
        elif shared:
            mlp = f"{self.hidden_size} / {shared}"
        words = {"hidden / MLP": mlp}
        if self.num_mamba_layers:
            words["Mamba2"] = f"{self.mamba_n_heads} heads of {self.mamba_d_head}, state {self.mamba_d_state}, "
            words["Mamba2"] += f"convolution {self.mamba_d_conv}, {plural(self.mamba_n_groups, 'group')}"
        words["multipliers"] = f"embedding {self.embedding_multiplier:g}, attention {self.attention_multiplier:g}, "
        words["multipliers"] += f"residual {self.residual_multiplier:g}, logits 1/{self.logits_scaling:g}"
        return words


def _expert_shapes(config: GraniteConfig, i: int) -> Iterator[TensorShape]:
    name, hidden = f"model.layers.{i}.block_sparse_moe", config.hidden_size
    experts, inner = config.num_local_experts, config.intermediate_size
    yield TensorShape(f"{name}.router.layer.weight", (experts, hidden), "router", i)
    yield TensorShape(f"{name}.input_linear.weight", (experts, 2 * inner, hidden), "experts", i)
    yield TensorShape(f"{name}.output_linear.weight", (experts, hidden, inner), "experts", i)


def _mamba_shapes(config: GraniteConfig, i: int) -> Iterator[TensorShape]:
    name, hidden, heads = f"model.layers.{i}.mamba", config.hidden_size, config.mamba_n_heads
    inner, conv_dim = config.mamba_intermediate_size, config.mamba_conv_dim
    rows = inner + conv_dim + heads  # gate | x, B, C | dt
    yield from linear(f"{name}.in_proj", rows, hidden, "mamba", i, config.mamba_proj_bias)
    yield TensorShape(f"{name}.conv1d.weight", (conv_dim, 1, config.mamba_d_conv), "mamba", i)
    if config.mamba_conv_bias:
        yield TensorShape(f"{name}.conv1d.bias", (conv_dim,), "mamba", i)
    for vector in ("dt_bias", "A_log", "D"):
        yield TensorShape(f"{name}.{vector}", (heads,), "mamba", i)
    yield TensorShape(f"{name}.norm.weight", (inner,), "mamba", i)
    yield from linear(f"{name}.out_proj", hidden, inner, "mamba", i, config.mamba_proj_bias)


def _mamba_from_gguf(file: GGUFMetadata) -> dict[str, Any]:
    inner, heads, hidden = file.key("ssm.inner_size"), file.key("ssm.time_step_rank"), file.key("embedding_length")
    counts = all(isinstance(size, int) and size > 0 for size in (inner, heads, hidden))
    if not counts or inner % heads or inner % hidden:
        raise ConfigError(
            f"{file.source}: ssm.inner_size {shown(inner)} is not a multiple of ssm.time_step_rank {shown(heads)} and "
            f"of embedding_length {shown(hidden)}; convert the model again."
        )
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_expand": inner // hidden,
        "mamba_d_state": file.key("ssm.state_size"),
        "mamba_d_conv": file.key("ssm.conv_kernel"),
        "mamba_n_groups": file.key("ssm.group_count"),
        "mamba_conv_bias": file.layers_have("ssm_conv1d.bias"),
        "mamba_proj_bias": file.layers_have("ssm_in.bias"),
    }


def _rotates(fields: ConfigFields, kinds: tuple[str, ...]) -> bool:
    """Whether attention has RoPE; where there is a choice, only if `position_embedding_type` says so."""
    return fields.choice("position_embedding_type", kinds, default=kinds[-1]) == "rope"


def _layer_types(fields: ConfigFields, layers: int) -> tuple[str, ...]:
    """Read `layer_types` in either dialect; absent, every layer is Mamba, as in transformers."""
    key = "layer_types" if fields.has("layer_types") else "layers_block_type"
    written = fields.names(key) or (MAMBA,) * layers
    if len(written) != layers:
        fields.refuse(f"{key!r} must list one type for each of the {layers} layers, but it lists {len(written)}.")
    for name in written:
        if name not in LAYER_TYPES:
            fields.refuse(f"{key!r} has {shown(name)}, which is not supported; supported: {', '.join(LAYER_TYPES)}.")
    return tuple(LAYER_TYPES[name] for name in written)


def _experts(fields: ConfigFields, minimum: int) -> dict[str, Any]:
    """Read the mixture of experts; `num_local_experts: 0` is a dense model although the key is there."""
    experts = fields.integer("num_local_experts", default=8, minimum=minimum)
    if experts == 0:
        return {}
    per_token = fields.integer("num_experts_per_tok", default=2)
    if per_token > experts:
        fields.refuse(f"'num_experts_per_tok' {per_token} is more than the {experts} of 'num_local_experts'.")
    return {"num_local_experts": experts, "num_experts_per_tok": per_token}


def _mamba(fields: ConfigFields, hidden_size: int) -> dict[str, Any]:
    """Read the Mamba2 keys and check that heads, width and groups agree."""
    heads, expand = fields.integer("mamba_n_heads"), fields.integer("mamba_expand", default=2)
    width, groups = expand * hidden_size, fields.integer("mamba_n_groups", default=1)
    automatic = fields.raw.get("mamba_d_head", "auto") in ("auto", None)
    d_head = width // heads if automatic else fields.integer("mamba_d_head")
    if heads * d_head != width:
        fields.refuse(
            f"'mamba_n_heads' {heads} times 'mamba_d_head' {d_head} is {heads * d_head}, "
            f"but 'mamba_expand' {expand} times 'hidden_size' {hidden_size} is {width}."
        )
    if heads % groups:
        fields.refuse(f"'mamba_n_heads' {heads} is not a multiple of 'mamba_n_groups' {groups}.")
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": d_head,
        "mamba_d_state": fields.integer("mamba_d_state"),
        "mamba_d_conv": fields.integer("mamba_d_conv", default=4, minimum=2),
        "mamba_n_groups": groups,
        "mamba_expand": expand,
        "mamba_chunk_size": fields.integer("mamba_chunk_size", default=256),
        "mamba_conv_bias": fields.boolean("mamba_conv_bias", default=True),
        "mamba_proj_bias": fields.boolean("mamba_proj_bias", default=False),
        "time_step_limit": _time_step_limit(fields),
    }


def _time_step_limit(fields: ConfigFields) -> tuple[float, float]:
    """Read the clamp of dt, whose upper end is usually infinity in one of JSON's spellings."""
    written = fields.raw.get("time_step_limit")
    if written is None:
        return 0.0, math.inf
    ends = [as_float(end) for end in written] if isinstance(written, list | tuple) else []
    if len(ends) != 2 or ends[0] is None or ends[1] is None or not ends[0] <= ends[1]:
        fields.refuse(f"'time_step_limit' must be two numbers in ascending order, but it is {shown(written)}.")
    return ends[0], ends[1]
