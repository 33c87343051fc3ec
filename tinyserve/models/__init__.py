"""One file per architecture, and the table that finds it: config and checkpoint in, model out.

The only place that tells architectures apart by name.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tinyserve.errors import ConfigError
from tinyserve.models.config import ModelConfig
from tinyserve.progress import Progress

if TYPE_CHECKING:
    from tinyserve.checkpoints.checkpoint import Array, Checkpoint
    from tinyserve.models.base import Model
    from tinyserve.models.matrix import Matrix

_HOMES = {
    "gpt2": ("gpt2", "GPT2"),
    "falcon": ("falcon", "Falcon"),
    "llama": ("llama", "Llama"),
    "mistral": ("llama", "Llama"),
    "granite": ("granite", "Granite"),
    "granitemoe": ("granite", "Granite"),
    "granitemoehybrid": ("granite", "Granite"),
}


def check_supported(config: ModelConfig) -> None:
    """Raise ConfigError for a family whose config is understood but whose forward pass is not built yet."""
    if config.model_type not in _HOMES:
        raise ConfigError(
            f"model_type {config.model_type!r} cannot run yet: its family is not built, only described "
            f"(inspect-config and compare know it). What runs: {', '.join(_HOMES)}."
        )


def build_model(
    config: ModelConfig,
    checkpoint: "Checkpoint",
    dtype: str,
    max_model_len: int,
    progress: Progress | None = None,
    built: "dict[str, Matrix | Array] | None" = None,
) -> "Model":
    """Load a model's weights in this dtype; `progress` hears ("load", numbers packed, numbers in all).

    `built` receives every matrix and array of the model under the names it was built from.

    Raises ConfigError for an unsupported architecture, CheckpointError for a missing or misshapen tensor.
    """
    from tinyserve.models.base import Loader

    check_supported(config)
    module_name, class_name = _HOMES[config.model_type]
    module: Any = import_module(f"tinyserve.models.{module_name}")
    loader = Loader(config, module.sanitize(checkpoint, config), dtype, max_model_len, progress)
    model: Model = getattr(module, class_name)(config, loader)
    if built is not None:
        built.update(loader.built)
    return model
