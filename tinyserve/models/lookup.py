"""The config of whatever the user named, offline.

Knows config.json and GGUF's metadata; what a name means is read by model_ref.py. It opens no weights and no network.
"""

from pathlib import Path
from typing import Any

from tinyserve.checkpoints import presets
from tinyserve.checkpoints.hub import cache
from tinyserve.checkpoints.json_file import read_json
from tinyserve.checkpoints.model_ref import ModelRef, is_gguf


def load_raw_config(ref: ModelRef) -> tuple[dict[str, Any], str]:
    """The config of a model: its keys, and where they are from.

    A preset's own config is what can be said offline; the config.json that was downloaded with its weights wins. Raises
    UnknownModelError for a repository that was not downloaded, ConfigError for a file that cannot be read.
    """
    path = ref.path or cache.find(ref.repo, ref.revision_in_force, ref.file)
    if path is None and ref.preset is not None:
        return ref.preset.raw_config, ref.preset.source
    if path is None:
        raise presets.unknown_model(ref.name)
    return _read(path)


def _read(path: Path) -> tuple[dict[str, Any], str]:
    if not path.is_dir() and is_gguf(path):
        from tinyserve.models.gguf_config import config_from_gguf

        return config_from_gguf(path), str(path)
    file = path / "config.json" if path.is_dir() else path
    return read_json(file), str(file)
