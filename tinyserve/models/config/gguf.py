"""What a GGUF file says of its model without a weight being read, and the keys that several families share.

Knows llama.cpp's keys; what the values mean is the families' business, and no array is seen here.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from tinyserve.checkpoints.fields import MAX_INTEGER, Fields, shown
from tinyserve.errors import ConfigError
from tinyserve.models.config.shapes import MAX_LAYERS


@dataclass(frozen=True)
class GGUFMetadata:
    """The keys of one file, the names of its tensors, and a way to ask for one number of a tensor."""

    source: str
    architecture: str  # general.architecture
    values: Mapping[str, Any]
    tensors: Collection[str]
    largest: Callable[[str], float]  # a tensor's name -> the largest number in it

    def key(self, name: str, *default: Any) -> Any:
        """The value of `architecture.name`; raises ConfigError where it is missing and there is no default."""
        full = f"{self.architecture}.{name}"
        if full not in self.values and not default:
            raise ConfigError(f"{self.source} lacks the metadata key {full!r}; convert the model again.")
        return self.values.get(full, *default)

    def integer(self, name: str, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        """The same for a key that must be a whole number."""
        self.key(name)
        return int(self._fields.integer(f"{self.architecture}.{name}", minimum=minimum, maximum=maximum))

    def integers(self, name: str) -> list[int]:
        """The same for a key that must be a list of whole numbers."""
        return self._fields.listed(f"{self.architecture}.{name}", int, "whole numbers")

    @property
    def _fields(self) -> Fields:
        return Fields(self.values, self.source)

    def require(self, name: str, built: Any) -> None:
        """Raise ConfigError for a key that turns a known architecture into one that is not built."""
        if (value := self.key(name, built)) not in (built, None):
            raise ConfigError(
                f"{self.source}: {self.architecture}.{name} is {shown(value)}, which is not supported; {built!r} is."
            )

    def layers_have(self, part: str) -> bool:
        """Whether any layer has this tensor, "attn_q.bias" for example."""
        return any(name.startswith("blk.") and name.split(".", 2)[2:] == [part] for name in self.tensors)

    def rope(self) -> dict[str, Any]:
        """RoPE's base, and how it is stretched; raises ConfigError for a way that is not built."""
        prefix = f"{self.architecture}.rope"
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.key("rope.freq_base", 10000.0)}
        # As llama.cpp reads it: without a type a factor is linear, under its old name too, and 0 stretches nothing.
        scaling = self._fields.choice(f"{prefix}.scaling.type", ("none", "linear"), default="linear")
        factor = self._fields.number(f"{prefix}.scaling.factor", f"{prefix}.scale_linear", default=0, positive=False)
        if scaling == "linear" and factor not in (0, 1):
            rope |= {"rope_type": "linear", "factor": factor}
        if "rope_freqs.weight" in self.tensors:
            if rope["rope_type"] == "linear":
                raise ConfigError(
                    f"{self.source}: {prefix}.scaling.factor is {factor:g} beside the tensor 'rope_freqs.weight': "
                    "positions that are stretched twice are not supported."
                )
            # llama.cpp bakes Llama 3's scaling into a tensor of divisors. Its rule (low 1, high 4, 8192 positions
            # before stretching) has one free number, the largest divisor.
            rope |= {
                "rope_type": "llama3",
                "factor": self.largest("rope_freqs.weight"),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": self.key("rope.scaling.original_context_length", 8192),
            }
        return rope

    def check_rotation(self) -> None:
        """Raise ConfigError where only a part of each head is rotated."""
        rotated, width = self.key("rope.dimension_count", None), self.key("attention.key_length", None)
        hidden, heads = self.key("embedding_length"), self.key("attention.head_count")
        if width is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
            width = hidden // heads
        if None not in (rotated, width) and rotated != width:
            raise ConfigError(
                f"{self.source}: {self.architecture}.rope.dimension_count is {rotated} and a head is {width} wide; "
                "only the rotation of whole heads is supported."
            )

    def decoder(self) -> dict[str, Any]:
        """The keys of config.json that Llama and its relatives share."""
        rope = self.rope()
        self.check_rotation()
        return {
            "num_hidden_layers": self.integer("block_count", maximum=MAX_LAYERS),
            "hidden_size": self.key("embedding_length"),
            "intermediate_size": self.key("feed_forward_length"),
            "num_attention_heads": self.key("attention.head_count"),
            "num_key_value_heads": self.key("attention.head_count_kv", None),
            "head_dim": self.key("attention.key_length", None),
            "max_position_embeddings": self.key("context_length"),
            "rms_norm_eps": self.key("attention.layer_norm_rms_epsilon"),
            "hidden_act": "silu",
            "rope_parameters": rope,
        }
