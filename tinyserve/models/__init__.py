"""Config and checkpoint in, model out. An architecture is models/config/X.py, models/X.py and a line of registry.py."""

from typing import TYPE_CHECKING

from tinyserve.errors import ConfigError
from tinyserve.models import registry
from tinyserve.models.config import ModelConfig
from tinyserve.progress import Progress

if TYPE_CHECKING:
    from tinyserve.checkpoints.checkpoint import Array, Checkpoint
    from tinyserve.models.base import DecoderModel, Loader
    from tinyserve.models.matrix import Matrix


def check_supported(config: ModelConfig) -> None:
    """Raise ConfigError for a family whose config is understood but whose forward pass is not built yet."""
    families = registry.by_model_type()
    if families[config.model_type].model is None:
        runs = ", ".join(name for name, family in families.items() if family.model)
        raise ConfigError(
            f"model_type {config.model_type!r} cannot run yet: its family is not built, only described "
            f"(inspect-config and compare know it). What runs: {runs}."
        )


def check_weights(config: ModelConfig, checkpoint: "Checkpoint") -> None:
    """Raise CheckpointError for a tensor that is missing, misshapen or left over; no weights are read."""
    _loader(config, checkpoint, "float32", max_model_len=1)


def build_model(
    config: ModelConfig,
    checkpoint: "Checkpoint",
    dtype: str,
    max_model_len: int,
    progress: Progress | None = None,
    built: "dict[str, Matrix | Array] | None" = None,
    layers: range | None = None,
) -> "DecoderModel":
    """Load a model's weights in this dtype; `progress` hears ("load", numbers packed, numbers in all).

    `built` receives every matrix and array of the model under the names it was built from. `layers` make a slice of it.

    Raises ConfigError for an unsupported architecture, CheckpointError for a missing or misshapen tensor.
    """
    loader = _loader(config, checkpoint, dtype, max_model_len, progress, layers)
    family = registry.by_model_type()[config.model_type]
    model: DecoderModel = getattr(family.model_module(), str(family.model))(config, loader)
    if built is not None:
        built.update(loader.built)
    return model


def _loader(
    config: ModelConfig,
    checkpoint: "Checkpoint",
    dtype: str,
    max_model_len: int,
    progress: Progress | None = None,
    layers: range | None = None,
) -> "Loader":
    from tinyserve.models.base import Loader

    check_supported(config)
    sanitize = registry.by_model_type()[config.model_type].model_module().sanitize
    return Loader(config, sanitize(checkpoint, config), dtype, max_model_len, progress, layers)
