"""The config of whatever the user named, offline.

Knows presets, folders, config.json and .gguf files; it opens no weights and no network.
"""

import json
from pathlib import Path
from typing import Any

from tinyserve.checkpoints import presets
from tinyserve.errors import ConfigError


def load_raw_config(model: str) -> tuple[dict[str, Any], str]:
    """Find the config of a preset, a downloaded repository, a folder, a file: its keys, and where they are from.

    A preset's own config is what can be said offline; the config.json that was downloaded with its weights wins.
    """
    preset = presets.find(model)
    if (downloaded := _downloaded(model, preset)) is not None:
        return _read_json(downloaded), str(downloaded)
    if preset is not None:
        return preset.raw_config, preset.source
    path = Path(model).expanduser()
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; name a folder that holds a checkpoint with its config.json.")
    if not path.is_file():
        raise presets.unknown_model(model)
    if path.suffix == ".gguf":
        from tinyserve.models.gguf_config import config_from_gguf

        return config_from_gguf(path), str(path)
    return _read_json(path), str(path)


def _downloaded(model: str, preset: presets.Preset | None) -> Path | None:
    """The config.json of a preset or "owner/name[@revision]" in the Hub's cache on this disk."""
    from tinyserve.checkpoints.hub import cache

    name, _, revision = model.partition("@")
    repo, revision = (preset.repo, preset.revision) if preset else (name, revision or "main")
    if repo.count("/") != 1 or repo.startswith(("/", ".", "~")):
        return None
    snapshot = cache.find(repo, revision)
    return snapshot / "config.json" if snapshot is not None and snapshot.is_dir() else None


def _read_json(path: Path) -> dict[str, Any]:
    """Read a config.json; raises ConfigError when it cannot be read or holds no object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); name a config.json, its folder, or a .gguf file.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds a {type(raw).__name__}, but a config is one JSON object.")
    return raw
