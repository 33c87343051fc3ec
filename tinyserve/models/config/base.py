"""What every architecture's config answers, and how one key of config.json is read, checked or refused.

Knows nothing of a particular architecture, of weights, or of where the file came from.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

from tinyserve.checkpoints.fields import Fields, shown
from tinyserve.models.config.gguf import GGUFMetadata
from tinyserve.models.config.shapes import MAX_LAYERS, TensorShape

ATTENTION: Final = "attention"
MAMBA: Final = "mamba"

# What stretches RoPE, where a type says how; each may be what it is without a stretch.
_STRETCHES: Final = ("factor", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "attention_factor")


@dataclass(frozen=True)
class RopeParameters:
    """Rotary position embedding: its base, and how its frequencies were stretched for longer contexts."""

    rope_theta: float
    rope_type: str = "default"  # "default" | "linear" | "llama3"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3 only, as are the two below
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


class Description(NamedTuple):
    """What a block is made of, in words."""

    position: str
    norm: str
    activation: str
    block: str


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """The questions every architecture answers, under Hugging Face's names.

    What is abstract has no answer that would do for all families: one that does not say cannot be parsed.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int  # the effective number: 1 for multi-query
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    layer_types: tuple[str, ...]  # "attention" | "mamba", one per layer

    @classmethod
    @abstractmethod
    def parse(cls, fields: "ConfigFields", model_type: str) -> Self:
        """Read a config.json; raises ConfigError naming file, key and value."""

    @classmethod
    @abstractmethod
    def from_gguf(cls, file: GGUFMetadata) -> dict[str, Any]:
        """The config.json, but for vocabulary, special tokens and the tied head, that a GGUF file's keys imply."""

    @abstractmethod
    def backbone_shapes(self) -> Iterator[TensorShape]:
        """Yield every tensor of the Hugging Face checkpoint but an untied head's, layer by layer."""

    @property
    @abstractmethod
    def attention_window(self) -> int | None:
        """How many positions a token's attention sees, itself included; None where it sees all."""

    @property
    @abstractmethod
    def active_experts(self) -> float:
        """The share of a layer's experts that one token passes through; 1 where there are none."""

    @property
    @abstractmethod
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The float32 arrays that one recurrent layer keeps for a sequence; none where no layer is recurrent."""

    @abstractmethod
    def describe(self) -> Description:
        """Say what a block is made of."""

    @abstractmethod
    def sizes(self) -> dict[str, str]:
        """Say how wide things are, where one number does not, by the name of what is said."""

    def tensor_shapes(self, layers: range | None = None) -> Iterator[TensorShape]:
        """Yield every tensor of this architecture's Hugging Face checkpoint, layer by layer; or what `layers` need."""
        for tensor in self._tensor_shapes():
            if layers is None or any(layer in layers for layer in self.layers_of(tensor)):
                yield tensor

    def _tensor_shapes(self) -> Iterator[TensorShape]:
        yield from self.backbone_shapes()
        if not self.tie_word_embeddings:
            yield TensorShape("lm_head.weight", (self.vocab_size, self.hidden_size), "head")

    def layers_of(self, tensor: TensorShape) -> set[int]:
        """The layers that a tensor is kept with: its own, or the first or last one, or both for a tied embedding."""
        first, last = 0, self.num_hidden_layers - 1
        if tensor.layer is not None:
            return {tensor.layer}
        if tensor.component == "embedding":
            return {first, last} if self.tie_word_embeddings else {first}
        return {first if tensor.component == "position" else last}

    def count_layers(self, kind: str, layers: range | None = None) -> int:
        """How many layers are of a kind, of all or of some `layers`."""
        return (self.layer_types if layers is None else self.layer_types[layers.start : layers.stop]).count(kind)

    @property
    def num_attention_layers(self) -> int:
        """How many layers keep keys and values."""
        return self.count_layers(ATTENTION)

    @property
    def num_mamba_layers(self) -> int:
        """How many layers keep a recurrent state."""
        return self.count_layers(MAMBA)


@dataclass(frozen=True, kw_only=True)
class DenseConfig(ModelConfig):
    """A family whose layers are attention and one MLP: no experts, and nothing recurrent."""

    @property
    def active_experts(self) -> float:
        return 1.0

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ()

    def sizes(self) -> dict[str, str]:
        return {"hidden / MLP": f"{self.hidden_size} / {self.intermediate_size}"}


class ConfigFields(Fields):
    """The keys of one config.json, with what several families read from more than one of them."""

    def heads(self, hidden_size: int, heads: int, kv_heads: int, default: int | None = None) -> int:
        """Check that query heads share key heads evenly, and return the width of one head.

        Without a `head_dim` and a `default` they share the hidden size out.
        """
        if heads % kv_heads:
            self.refuse(
                f"'num_attention_heads' {heads} is not a multiple of the {kv_heads} key-value heads "
                "('num_key_value_heads'), so they cannot be shared out."
            )
        if self.has("head_dim") or default is not None:
            return int(self.integer("head_dim", default=default))
        self._check_shares(hidden_size, heads, ", and there is no 'head_dim' to say how wide a head is")
        return hidden_size // heads

    def equal_heads(self, hidden_size: int, heads: int, kv_heads: int) -> int:
        """The same where the heads share the hidden size out, and `head_dim` can only repeat what that gives."""
        self._check_shares(hidden_size, heads, "")
        head_dim = self.heads(hidden_size, heads, kv_heads)
        if head_dim * heads != hidden_size:
            self.refuse(
                f"'head_dim' is {head_dim}, but {heads} heads that share the hidden size {hidden_size} out are "
                f"{hidden_size // heads} wide."
            )
        return head_dim

    def _check_shares(self, hidden_size: int, heads: int, but: str) -> None:
        if hidden_size % heads:
            width, number = (
                self._spelled("hidden_size", "n_embd", "n_embed"),
                self._spelled("num_attention_heads", "n_head"),
            )
            self.refuse(f"{width!r} {hidden_size} is not a multiple of the {heads} attention heads ({number!r}){but}.")

    def _spelled(self, *keys: str) -> str:
        """Whichever of a key's spellings the file has."""
        return next((key for key in keys if self.has(key)), keys[0])

    def check_rotary(self, head_dim: int) -> None:
        """Refuse heads that RoPE cannot turn."""
        if head_dim % 2:
            self.refuse(
                f"'head_dim' is {head_dim}, but rotary positions turn the two halves of a head: it must be even."
            )

    def rope(self, max_position_embeddings: int, default_theta: float = 10000.0) -> RopeParameters:
        """Read RoPE in either dialect: `rope_theta` and `rope_scaling`, or both in `rope_parameters`."""
        key = "rope_scaling" if self.raw.get("rope_scaling") else "rope_parameters"
        values = self.raw.get(key) or {}
        if not isinstance(values, Mapping) or any(isinstance(value, Mapping) for value in values.values()):
            self.refuse(f"{key!r} must be one flat object for all layers, but it is {shown(values)}.")
        scaling = self.inside(key, values)
        theta = scaling.number("rope_theta", default=self.number("rope_theta", default=default_theta))
        for owner in (self, scaling):
            if (rotated := owner.number("partial_rotary_factor", default=1.0)) != 1.0:
                owner.refuse(f"'partial_rotary_factor' is {rotated}, but only whole heads (1.0) can be rotated.")
        kind = "rope_type" if scaling.has("rope_type") else "type"
        stretches = [name for name in _STRETCHES if scaling.has(name) and values[name] != 1]
        if stretches and not scaling.has(kind):
            scaling.refuse(
                f"{stretches[0]!r} is {shown(values[stretches[0]])} without a 'rope_type' that says how positions are "
                "stretched: add the one that the model was trained with, linear or llama3, or default for none."
            )
        rope_type = scaling.choice(kind, ("default", "linear", "llama3"), default="default")
        if rope_type == "default":
            return RopeParameters(rope_theta=theta)
        factor = scaling.number("factor")
        if rope_type == "linear":
            return RopeParameters(rope_theta=theta, rope_type=rope_type, factor=factor)
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        if low >= high:
            scaling.refuse(f"'low_freq_factor' {low} must be less than 'high_freq_factor' {high}.")
        original = scaling.integer("original_max_position_embeddings", default=max_position_embeddings)
        return RopeParameters(theta, rope_type, factor, low, high, original)


def common_fields(
    fields: ConfigFields,
    model_type: str,
    *,
    spellings: Mapping[str, tuple[str, ...]],
    defaults: Mapping[str, Any],
    **known: Any,
) -> dict[str, Any]:
    """Read the fields of ModelConfig, but for those that a family has worked out and hands in as `known`.

    `spellings` are a field's keys where they are not its own name, the preferred one first; a field that is not in
    `defaults` is required, but for the number of key-value heads: one for each query head.
    """

    def integer(name: str) -> int:
        if name in known:
            return int(known[name])
        limits = {"maximum": MAX_LAYERS} if name == "num_hidden_layers" else {}
        default = {"default": defaults[name]} if name in defaults else {}
        return int(fields.integer(*spellings.get(name, (name,)), **default, **limits))

    hidden_size, heads = integer("hidden_size"), integer("num_attention_heads")
    defaults = {"num_key_value_heads": heads} | dict(defaults)
    kv_heads, layers = integer("num_key_value_heads"), integer("num_hidden_layers")
    return {
        "model_type": model_type,
        "vocab_size": integer("vocab_size"),
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": known.get("head_dim") or fields.heads(hidden_size, heads, kv_heads, defaults.get("head_dim")),
        "intermediate_size": integer("intermediate_size"),
        "max_position_embeddings": integer("max_position_embeddings"),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", default=defaults["tie_word_embeddings"]),
        "bos_token_id": fields.token_id("bos_token_id", default=defaults["bos_token_id"]),
        "eos_token_ids": fields.token_ids("eos_token_id", default=defaults["eos_token_id"]),
        "layer_types": known.get("layer_types", (ATTENTION,) * layers),
    }
