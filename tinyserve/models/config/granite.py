"""Granite's config: a Llama with four multipliers, optionally with experts, optionally with Mamba2 layers.

Knows only keys and values; the forward pass is tinyserve/models/granite.py.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

from tinyserve.models.config.base import ATTENTION, MAMBA, Fields, ModelConfig, RopeParameters, as_float

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
    def parse(cls, fields: Fields, model_type: str) -> Self:
        """Read a config.json of any Granite; defaults are those of transformers' three classes."""
        hidden_size = fields.integer("hidden_size")
        heads = fields.integer("num_attention_heads")
        kv_heads = fields.integer("num_key_value_heads", default=heads)
        positions = fields.integer("max_position_embeddings")
        layers = fields.integer("num_hidden_layers")
        hybrid = model_type == "granitemoehybrid"
        layer_types = _layer_types(fields, layers) if hybrid else (ATTENTION,) * layers
        head_dim = fields.heads(hidden_size, heads, kv_heads)
        rotates = _rotates(fields, ("rope", "nope") if hybrid else ("rope",))
        if rotates:
            fields.check_rotary(head_dim)
        fields.choice("normalization_function", ("rmsnorm",), default="rmsnorm")
        extra: dict[str, Any] = {}
        if model_type != "granite":
            extra |= _experts(fields, minimum=0 if hybrid else 1)
        if hybrid:
            extra["shared_intermediate_size"] = fields.integer("shared_intermediate_size", default=1024)
        if MAMBA in layer_types:
            extra |= _mamba(fields, hidden_size)
        return cls(
            model_type=model_type,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=fields.integer("intermediate_size"),
            max_position_embeddings=positions,
            tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
            bos_token_id=fields.token_id("bos_token_id", default=1),
            eos_token_ids=fields.token_ids("eos_token_id", default=2),
            layer_types=layer_types,
            embedding_multiplier=fields.number("embedding_multiplier", default=1.0),
            attention_multiplier=fields.number("attention_multiplier", default=1.0),
            residual_multiplier=fields.number("residual_multiplier", default=1.0),
            logits_scaling=fields.number("logits_scaling", default=1.0),
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
            hidden_act=fields.choice("hidden_act", ("silu",), default="silu"),
            attention_bias=fields.boolean("attention_bias", default=False),
            mlp_bias=model_type == "granite" and fields.boolean("mlp_bias", default=False),
            rope=fields.rope(positions) if rotates else None,
            **extra,
        )


def _rotates(fields: Fields, kinds: tuple[str, ...]) -> bool:
    """Whether attention has RoPE; where there is a choice, only if `position_embedding_type` says so."""
    return fields.choice("position_embedding_type", kinds, default=kinds[-1]) == "rope"


def _layer_types(fields: Fields, layers: int) -> tuple[str, ...]:
    """Read `layer_types` in either dialect; absent, every layer is Mamba, as in transformers."""
    key = "layer_types" if fields.has("layer_types") else "layers_block_type"
    written = fields.names(key) or (MAMBA,) * layers
    if len(written) != layers:
        fields.refuse(f"{key!r} must list one type for each of the {layers} layers, but it lists {len(written)}.")
    for name in written:
        if name not in LAYER_TYPES:
            fields.refuse(f"{key!r} has {name!r}, which is not supported; supported: {', '.join(LAYER_TYPES)}.")
    return tuple(LAYER_TYPES[name] for name in written)


def _experts(fields: Fields, minimum: int) -> dict[str, Any]:
    """Read the mixture of experts; `num_local_experts: 0` is a dense model although the key is there."""
    experts = fields.integer("num_local_experts", default=8, minimum=minimum)
    if experts == 0:
        return {}
    per_token = fields.integer("num_experts_per_tok", default=2)
    if per_token > experts:
        fields.refuse(f"'num_experts_per_tok' {per_token} is more than the {experts} of 'num_local_experts'.")
    return {"num_local_experts": experts, "num_experts_per_tok": per_token}


def _mamba(fields: Fields, hidden_size: int) -> dict[str, Any]:
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


def _time_step_limit(fields: Fields) -> tuple[float, float]:
    """Read the clamp of dt, whose upper end is usually infinity in one of JSON's spellings."""
    written = fields.raw.get("time_step_limit")
    if written is None:
        return 0.0, math.inf
    ends = [as_float(end) for end in written] if isinstance(written, list | tuple) else []
    if len(ends) != 2 or ends[0] is None or ends[1] is None or not ends[0] <= ends[1]:
        fields.refuse(f"'time_step_limit' must be two numbers in ascending order, but it is {written!r}.")
    return ends[0], ends[1]
