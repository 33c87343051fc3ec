"""Where downloaded models lie: huggingface_hub's cache, and tinyserve's own. It knows no network.

huggingface_hub documents its layout (models--owner--name/{blobs,refs,snapshots}); reading it here answers a
warm `resolve` in a millisecond, where importing the library costs 200.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinyserve.checkpoints.gguf_parts import first_parts, parts_of
from tinyserve.checkpoints.shard_index import INDEX, WHOLE, read_index
from tinyserve.errors import CheckpointError

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
DEFAULT_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class CachedModel:
    """One model here: `name` is what `resolve` and `remove` take, `source` "hub", "wheel" or "package" (no repo)."""

    name: str
    repo: str
    revision: str
    path: Path
    bytes: int
    source: str


def hub_cache() -> Path:
    """The folder of huggingface_hub's cache, by the same variables in the same order as the library's."""
    variables = os.environ
    home = variables.get("HF_HOME") or f"{variables.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    folder = variables.get("HF_HUB_CACHE") or variables.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(os.path.expandvars(folder)).expanduser()


def own_models() -> Path:
    """The folder of models that came from elsewhere than the Hub; TINYSERVE_CACHE moves its parent."""
    if base := os.environ.get("TINYSERVE_CACHE"):
        return Path(base).expanduser() / "models"
    from platformdirs import user_cache_path

    return user_cache_path("tinyserve", appauthor=False) / "models"


def default_gguf() -> Path | None:
    """The default model's GGUF file, if it is here; its hash was checked before it got its name."""
    path = own_models() / DEFAULT_GGUF
    return path if path.is_file() else None


def offline() -> bool:
    """Whether the user forbids the network by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def repo_folder(repo: str) -> Path:
    """The folder of one repository in huggingface_hub's cache."""
    return hub_cache() / f"models--{repo.replace('/', '--')}"


def lock_of(repo: str) -> Path:
    """The file that is locked while tinyserve downloads a repository."""
    return hub_cache() / ".locks" / repo_folder(repo).name / "tinyserve.lock"


def is_locked(lock: Path) -> bool:
    """Whether another process holds a lock; the file of the lock stays."""
    if not lock.is_file():
        return False
    from filelock import FileLock, Timeout

    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # a file system without locks, or somebody else's file
        return False


def commit_of(repo: str, revision: str) -> str | None:
    """The commit a revision had when it was last downloaded; a commit is its own answer."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    ref = repo_folder(repo) / "refs" / revision
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else None


def find(repo: str, revision: str, file: str | None = None, *, with_tokenizer: bool = True) -> Path | None:
    """The snapshot of a repository, or one file in it, if everything it needs is here; no network."""
    commit = commit_of(repo, revision)
    if commit is None:
        return None
    folder = repo_folder(repo) / "snapshots" / commit
    if file is not None:
        return _whole(folder, file)
    if has_weights(folder):
        has_tokenizer = any((folder / name).is_file() for name in TOKENIZERS)
        return folder if has_tokenizer or not with_tokenizer else None
    ggufs = first_parts(path.name for path in folder.glob("*.gguf"))
    return _whole(folder, ggufs[0]) if len(ggufs) == 1 and not (folder / "config.json").is_file() else None


def _whole(folder: Path, file: str) -> Path | None:
    """A GGUF file, or the first of the parts that it is one of, if all of them are here."""
    parts = parts_of(file)
    return folder / parts[0] if all((folder / part).is_file() for part in parts) else None


def can_load(folder: Path) -> bool:
    """Whether a snapshot holds a model that tinyserve loads."""
    return has_weights(folder) or any(path.is_file() for path in folder.rglob("*.gguf"))


def files_of(folder: Path) -> set[str]:
    """The files of a snapshot that tinyserve downloads, by name, links to nothing among them."""
    names = {*SMALL_FILES}
    if os.path.lexists(folder / WHOLE):
        names.add(WHOLE)
    elif (folder / INDEX).is_file():
        names.add(INDEX)
        with suppress(ValueError):
            names.update(shards_of(folder / INDEX))
    elif os.path.lexists(folder / "config.json"):
        names.update(path.name for path in folder.glob("*.safetensors"))
    else:
        names.update(path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf"))
    return {name for name in names if os.path.lexists(folder / name)}


def has_weights(folder: Path) -> bool:
    """Whether a folder holds config.json and every safetensors shard its index names."""
    if not (folder / "config.json").is_file():
        return False
    if (folder / WHOLE).is_file():
        return True
    if (folder / INDEX).is_file():
        try:
            return all((folder / shard).is_file() for shard in shards_of(folder / INDEX))
        except CheckpointError:
            return False
    return any(path.is_file() for path in folder.glob("*.safetensors"))


def shards_of(index: Path) -> list[str]:
    """The shards a model.safetensors.index.json names; raises CheckpointError if it is no index."""
    return sorted(set(read_index(index).values()))


def models_from_hub() -> Iterator[CachedModel]:
    """Every snapshot in huggingface_hub's cache that tinyserve can load, and every GGUF file beside them."""
    for folder in sorted(hub_cache().glob("models--*/snapshots/*")):
        repo = folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        at = "" if commit_of(repo, "main") == folder.name else f"@{folder.name}"
        if has_weights(folder):
            yield CachedModel(f"{repo}{at}", repo, folder.name, folder, _size(folder), "hub")
        for name in first_parts(path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")):
            if (gguf := _whole(folder, name)) is not None:
                total = sum((folder / part).stat().st_size for part in parts_of(name))
                yield CachedModel(f"{repo}/{name}{at}", repo, folder.name, gguf, total, "hub")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
