"""What `tinyserve rm` deletes of caches that belong to others too: what tinyserve loads of a model, and no more.

huggingface_hub scans its cache and deletes in it, so that what revisions or repositories share stays as long as one of
them needs it. It knows no network and no presets.
"""

import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyserve.checkpoints.gguf_parts import parts_of
from tinyserve.checkpoints.hub import cache
from tinyserve.errors import HubError, UserError

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, DeleteCacheStrategy, HFCacheInfo

# As tinyserve and huggingface_hub 1 name a download that can go on; huggingface_hub 2's have a random part as well.
_PARTIAL = re.compile(r"([0-9a-f]{40}|[0-9a-f]{64})\.incomplete")


@dataclass(frozen=True)
class Removal:
    """What would go, and `bytes`, how much that is on disk, what others share included. Nothing is deleted yet."""

    bytes: int = 0
    loose: tuple[Path, ...] = ()  # unfinished downloads, links to nothing, files of tinyserve's own cache
    strategy: "DeleteCacheStrategy | None" = None
    repo: str = ""

    def __bool__(self) -> bool:
        return bool(self.loose) or self.strategy is not None

    def execute(self) -> int:
        """Delete it; returns the bytes that are free now. Raises UserError while it is being downloaded, HubError."""
        folder = cache.repo_folder(self.repo)
        if self.repo and cache.is_locked(cache.lock_of(self.repo)):
            raise UserError(f"{self.repo} is being downloaded by another process: wait for it, or stop it first.")
        shared = cache.hub_cache().glob(f"blobs/??/{'?' * 64}")
        payloads = (folder / "blobs", folder / "snapshots", *shared)
        roots = (*self.loose, *(payloads if self.repo else []))
        before = _inodes(roots)
        try:
            for path in self.loose:
                path.unlink(missing_ok=True)
            if self.strategy is not None:
                self.strategy.execute()
                goes = (*self.strategy.files, *self.strategy.repos, *self.strategy.snapshots, *self.strategy.blobs)
                if left := [path for path in goes if os.path.lexists(path)]:  # the library only logs it
                    raise HubError(f"{left[0]} could not be deleted: see who owns it, and that nobody has it open.")
        except OSError as error:
            where = error.filename or folder
            raise HubError(f"{where} could not be deleted ({error.strerror or error}): see who owns it.") from error
        if self.repo:
            for empty in (folder / "snapshots", folder / "blobs", folder):
                with suppress(OSError):
                    empty.rmdir()
        after = _inodes(roots)
        return sum(size for key, (size, is_elsewhere) in before.items() if key not in after and not is_elsewhere)


def of_model(repo: str, revision: str, file: str | None = None, *, unfinished: bool = False) -> Removal:
    """What tinyserve loads of one revision of a repository, or one GGUF file of it with its other parts.

    `unfinished` adds what interrupted downloads left: partial files, and the snapshots that they belong to.
    """
    if not cache.repo_folder(repo).is_dir():
        return Removal()
    from huggingface_hub import scan_cache_dir

    info = scan_cache_dir(cache.hub_cache())
    folder = cache.hub_cache().resolve() / cache.repo_folder(repo).name  # as the library says it
    scanned = next((r for r in info.repos if r.repo_path == folder), None)
    ours = scanned or _scan_damaged(folder)
    info = replace(info, repos=(info.repos - {ours}) | {ours})
    partials = _partials(folder) if unfinished else []
    commits = {cache.commit_of(repo, revision)}
    if partials:
        commits |= {r.commit_hash for r in ours.revisions if not r.refs and not cache.can_load(r.snapshot_path)}
    names = {
        commit: set(parts_of(file)) if file else cache.files_of(folder / "snapshots" / commit)
        for commit in commits
        if commit
    }
    links = [folder / "snapshots" / commit / name for commit in names for name in names[commit]]
    dangling = [link for link in links if link.is_symlink() and not link.exists()]
    selected = [
        file
        for revision_ in ours.revisions
        for file in revision_.files
        if file.file_path.relative_to(revision_.snapshot_path).as_posix() in names.get(revision_.commit_hash, ())
    ]
    sizes = {file.blob_path: file.size_on_disk for file in selected} | {p: p.stat().st_size for p in partials}
    strategy = _strategy(info, ours, {file.file_path for file in selected}) if selected else None
    return Removal(sum(sizes.values()), (*partials, *dangling), strategy, repo)


def of_files(paths: Iterable[Path]) -> Removal:
    """Files of tinyserve's own cache, those that are there."""
    found = tuple(path for path in paths if path.is_file())
    return Removal(sum(path.stat().st_size for path in found), found)


def both(one: Removal, other: Removal) -> Removal:
    """Two removals as one; the second is of files alone."""
    return replace(one, bytes=one.bytes + other.bytes, loose=one.loose + other.loose)


def unfinished_bytes(repo: str) -> int:
    """The bytes of interrupted downloads of a repository."""
    return sum(path.stat().st_size for path in _partials(cache.repo_folder(repo)))


def _strategy(info: "HFCacheInfo", repo: "CachedRepoInfo", going: set[Path]) -> "DeleteCacheStrategy":
    """Whole revisions, with their references, where nothing else is in them; else single files."""
    touched = [r for r in repo.revisions if any(file.file_path in going for file in r.files)]
    is_whole = all(file.file_path in going for r in touched for file in r.files)
    # With its last revision the library deletes a repository's folder: with it what others are downloading, and of a
    # folder that lies elsewhere the link alone.
    others = set(repo.repo_path.glob("blobs/*.incomplete")).difference(_partials(repo.repo_path))
    if is_whole and not others and not repo.repo_path.is_symlink():
        # Of this repository only: a copy of it has the same commits.
        alone = replace(info, repos=frozenset({repo}))
        return alone.delete_revisions(*(r.commit_hash for r in touched))
    return info.delete_files(*(file for r in touched for file in r.files if file.file_path in going))


def _scan_damaged(folder: Path) -> "CachedRepoInfo":
    """The record of a repository that the library does not scan: a link to nothing in it, no snapshot yet."""
    from huggingface_hub import CachedFileInfo, CachedRepoInfo, CachedRevisionInfo

    refs: dict[str, set[str]] = {}
    for ref in (folder / "refs").rglob("*"):
        if ref.is_file():
            commit = ref.read_text(encoding="utf-8").strip()
            refs.setdefault(commit, set()).add(ref.relative_to(folder / "refs").as_posix())
    revisions = set()
    for snapshot in (path for path in folder.glob("snapshots/*") if path.is_dir()):
        files = set()
        for path in (path for path in snapshot.rglob("*") if path.is_file()):
            # One hop: a blob may be a link itself, into what repositories share.
            blob = Path(os.path.normpath(path.parent / path.readlink())) if path.is_symlink() else path
            size = blob.stat().st_size
            files.add(CachedFileInfo(path.name, path, blob, size, blob_last_accessed=0, blob_last_modified=0))
        name, named = snapshot.name, frozenset(refs.get(snapshot.name, ()))
        revisions.add(CachedRevisionInfo(name, snapshot, 0, frozenset(files), named, last_modified=0))
    return CachedRepoInfo(folder.name, "model", folder, 0, 0, frozenset(revisions), last_accessed=0, last_modified=0)


def _partials(folder: Path) -> list[Path]:
    """Unfinished downloads that nobody goes on with at this moment."""
    locks = cache.hub_cache() / ".locks" / folder.name
    partials = []
    for path in sorted(folder.glob("blobs/*.incomplete")):
        match = _PARTIAL.fullmatch(path.name)
        if match is not None and not cache.is_locked(locks / f"{match[1]}.lock"):
            partials.append(path)
    return partials


def _inodes(roots: Iterable[Path]) -> dict[tuple[int, int], tuple[int, bool]]:
    """Of each regular file under these paths its size, and whether it has a name elsewhere too (a hard link)."""
    names: dict[tuple[int, int], int] = {}
    status: dict[tuple[int, int], os.stat_result] = {}
    for root in roots:
        for path in (root, *root.rglob("*")) if root.is_dir() else (root,):
            with suppress(OSError):
                found = path.lstat()
                if stat.S_ISREG(found.st_mode):
                    key = found.st_dev, found.st_ino
                    names[key], status[key] = names.get(key, 0) + 1, found
    return {key: (found.st_size, found.st_nlink > names[key]) for key, found in status.items()}
