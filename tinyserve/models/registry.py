"""Which files an architecture is: for each family its module, its classes, and the names that files have for it.

The only place where families are listed. Nothing is imported until a family is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from tinyserve.models.config.base import ModelConfig


class Family(NamedTuple):
    """models/config/<module>.py has the config, models/<module>.py the forward pass and `sanitize`."""

    module: str
    config: str
    model: str | None  # None: described by inspect-config and compare, and not run
    model_types: tuple[str, ...]  # of config.json
    architectures: tuple[str, ...]  # of GGUF: general.architecture

    def config_class(self) -> "type[ModelConfig]":
        """The class that reads this family's config.json."""
        found: type[ModelConfig] = getattr(import_module(f"tinyserve.models.config.{self.module}"), self.config)
        return found

    def model_module(self) -> Any:
        """The module of the forward pass, which imports the kernels."""
        return import_module(f"tinyserve.models.{self.module}")


FAMILIES = (
    Family("gpt2", "GPT2Config", "GPT2", ("gpt2",), ("gpt2",)),
    Family("falcon", "FalconConfig", "Falcon", ("falcon", "RefinedWeb", "RefinedWebModel"), ("falcon",)),
    Family("llama", "LlamaConfig", "Llama", ("llama", "mistral"), ("llama",)),
    Family(
        "granite",
        "GraniteConfig",
        "Granite",
        ("granite", "granitemoe", "granitemoehybrid"),
        ("granite", "granitemoe", "granitehybrid"),
    ),
    Family("qwen", "QwenConfig", "Qwen", ("qwen2", "qwen3"), ("qwen2", "qwen3")),
)


def by_model_type() -> dict[str, Family]:
    """model_type of config.json -> family."""
    return {name: family for family in FAMILIES for name in family.model_types}


def by_architecture() -> dict[str, Family]:
    """general.architecture of a GGUF file -> family."""
    return {name: family for family in FAMILIES for name in family.architectures}
