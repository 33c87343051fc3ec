"""From the Hugging Face Hub into its cache: only what loads, resumable, every failure one sentence.

It knows no presets and no local models. The client, its session, its token and its cache are
huggingface_hub's; the body of a file is fetched here, because the library gives up the bytes of a download
that was interrupted.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tinyserve.checkpoints.gguf_parts import first_parts, parts_of
from tinyserve.checkpoints.hub import cache
from tinyserve.checkpoints.hub.failures import (
    endpoint,
    in_sentences,
    no_room,
    reason_of,
    transport_error,
    unreachable,
)
from tinyserve.checkpoints.hub.patience import within
from tinyserve.checkpoints.hub.transfer import Transfer, append
from tinyserve.checkpoints.shard_index import INDEX, WHOLE
from tinyserve.errors import CheckpointError, HubError, HubUnreachable
from tinyserve.progress import Progress, import_tqdm, silent, size

TIMEOUT = 8.0  # seconds without an answer, or without a byte, after which a sentence is better than waiting
CONNECT_TIMEOUT = 3.0  # for each address of a host
PICKLES = (".bin", ".pt", ".pth", ".pickle", ".pkl", ".ckpt")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; the etag (sha256 of a large file, git's sha1 of a small one) names its blob."""

    name: str
    size: int | None
    etag: str | None


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit."""

    repo: str
    commit: str
    files: dict[str, RemoteFile]


def fetch(
    repo: str, revision: str, file: str | None = None, *, progress: Progress = silent, patience: float = TIMEOUT
) -> Path:
    """Download what `repo` needs to be loaded, or one file of it; the snapshot folder, or the file in it.

    `patience` is how long, in seconds, the Hub may take to answer at all. Raises HubError.
    """
    with in_sentences(repo, revision, file):
        listing = within(patience, lambda: list_files(repo, revision))
        lock_file = cache.lock_of(repo)
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(lock_file, repo, progress):
            path = _fetch_files(listing, file, progress)
            if revision != listing.commit:  # written last, so that a name never points at half a download
                ref = cache.repo_folder(repo) / "refs" / revision
                ref.parent.mkdir(parents=True, exist_ok=True)
                ref.write_text(listing.commit, encoding="utf-8")
            return path


@contextmanager
def _locked(lock_file: Path, repo: str, progress: Progress) -> Iterator[None]:
    """One process at a time downloads a repository; the next one says that it waits."""
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"wait download {repo}", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def list_files(repo: str, revision: str) -> Listing:
    """The commit of a revision, and its files with sizes and hashes, in one request."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint(), library_name="tinyserve")
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
    except (KeyError, TypeError) as error:
        raise HubUnreachable(unreachable("the answer is not the Hub's")) from error
    if info.sha is None or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
        raise HubUnreachable(unreachable("the answer is not the Hub's"))
    files = {}
    for entry in info.siblings or []:
        name, etag = entry.rfilename, entry.lfs.sha256 if entry.lfs else entry.blob_id
        if ".." in name or "\\" in name or name.startswith("/"):  # names become paths here
            continue
        if etag is not None and not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
            etag = None
        files[name] = RemoteFile(name, entry.lfs.size if entry.lfs else entry.size, etag)
    return Listing(repo, info.sha, files)


def choose_weights(listing: Listing, index: Path | None) -> list[str]:
    """The weights to download, at the root of the repository: one file, or the shards its index names.

    `index` is the downloaded model.safetensors.index.json, if there is one. Raises HubError if nothing here
    loads.
    """
    if WHOLE in listing.files:
        return [WHOLE]
    if index is not None:
        try:
            shards = cache.shards_of(index)
        except CheckpointError as error:
            raise HubError(f"{error} Tell the authors of {listing.repo}, or try another revision.") from error
        if missing := [shard for shard in shards if shard not in listing.files]:
            raise HubError(
                f"{listing.repo} has no {missing[0]}, which its {INDEX} names: tell its authors, or "
                "try another revision."
            )
        return shards
    if single := [name for name in listing.files if name.endswith(".safetensors") and "/" not in name]:
        return single
    raise HubError(_nothing_to_load(listing))


def _nothing_to_load(listing: Listing) -> str:
    repo = listing.repo
    if ggufs := first_parts(listing.files):
        return f"{repo} holds {len(ggufs)} GGUF files: choose one, as in " + ", ".join(
            f"`tinyserve pull {repo}/{name}`" for name in ggufs[:12]
        )
    if pickles := [name for name in listing.files if name.endswith(PICKLES)]:
        return (
            f"{repo} has its weights only as pickles ({pickles[0]}), which run code when loaded: choose a "
            "revision or a repository with safetensors."
        )
    return f"{repo} holds no safetensors and no GGUF: choose a repository with a model in it."


def _fetch_files(listing: Listing, file: str | None, progress: Progress) -> Path:
    """Small files first and weights last, so that weights in a snapshot mean that everything is there."""
    folder = cache.repo_folder(listing.repo) / "snapshots" / listing.commit
    if file is None and "config.json" not in listing.files:
        ggufs = first_parts(listing.files)
        if len(ggufs) != 1:
            if not ggufs and any(name.endswith(".safetensors") for name in listing.files):
                raise HubError(f"{listing.repo} has no config.json: choose a repository with a complete model.")
            raise HubError(_nothing_to_load(listing))
        file = ggufs[0]
    if file is not None:
        parts = parts_of(file)
        if missing := [part for part in parts if part not in listing.files]:
            names = ", ".join(name for name in listing.files if name.endswith(".gguf")) or "no GGUF file at all"
            raise HubError(f"{listing.repo} has no {missing[0]}: it has {names}.")
        _download(listing, parts, progress)
        return folder / parts[0]
    index = None
    if INDEX in listing.files and WHOLE not in listing.files:
        _download(listing, [INDEX], silent)
        index = folder / INDEX
    _download(listing, [n for n in cache.SMALL_FILES if n in listing.files] + choose_weights(listing, index), progress)
    return folder


def _download(listing: Listing, names: list[str], progress: Progress) -> None:
    """Bring the named files into the snapshot folder, past what is there already."""
    folder = cache.repo_folder(listing.repo)
    wanted = [listing.files[name] for name in names]
    wanted = [file for file in wanted if not (folder / "snapshots" / listing.commit / file.name).is_file()]
    if not wanted:
        return
    blobs = folder / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    total = sum(file.size or 0 for file in wanted)
    missing = total - sum(_size_of(_partial(blobs, file)) for file in wanted if file.etag)
    if missing > (free := shutil.disk_usage(blobs).free):
        raise HubError(no_room(listing.repo, f"{size(missing)} more, and {size(free)} are free"))
    import_tqdm()  # before the library does, which would have a notebook told that ipywidgets are missing
    import huggingface_hub.file_download  # noqa: F401  # half a second in which a bar would stand still

    with Transfer(listing.repo, total, progress) as transfer:
        for file in wanted:
            _bring(listing, file, transfer)


def _bring(listing: Listing, file: RemoteFile, transfer: Transfer) -> None:
    """One file: its missing bytes into a partial blob, checked, renamed, and linked into the snapshot."""
    from huggingface_hub import hf_hub_download, hf_hub_url

    if file.etag is None or file.size is None:  # a mirror that lists names only
        hf_hub_download(
            listing.repo,
            file.name,
            revision=listing.commit,
            endpoint=endpoint(),
            cache_dir=cache.hub_cache(),
            etag_timeout=TIMEOUT,
        )
        return
    folder = cache.repo_folder(listing.repo)
    blob = folder / "blobs" / file.etag
    if not blob.is_file():
        partial = _partial(blob.parent, file)
        resumed = _size_of(partial) > 0
        url = hf_hub_url(listing.repo, file.name, revision=listing.commit, endpoint=endpoint())
        _get(url, partial, file, transfer)
        try:
            _check(partial, file, whole=resumed)
        except HubError:
            partial.unlink()
            raise
        partial.replace(blob)
    transfer.at(file.name, file.size)
    link = folder / "snapshots" / listing.commit / file.name
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(os.path.relpath(blob, link.parent))
    except FileExistsError:
        if not link.is_file():  # a link whose blob is gone
            link.unlink()
            link.symlink_to(os.path.relpath(blob, link.parent))
    except OSError:  # no symlinks here: the file itself, as huggingface_hub does
        blob.replace(link)


def _get(url: str, partial: Path, file: RemoteFile, transfer: Transfer) -> None:
    """Append the missing bytes of a file, going on after a cut as long as bytes keep coming."""
    from huggingface_hub import errors

    whole = file.size or 0
    partial.touch()
    while (have := _size_of(partial)) != whole:
        if have > whole:
            partial.write_bytes(b"")
            continue
        started = time.monotonic()
        try:
            _stream(url, partial, have, lambda done: transfer.at(file.name, done))
            if _size_of(partial) == have:
                raise HubUnreachable(f"{endpoint()} sends nothing of {file.name} after byte {have}: try again later.")
        except errors.HfHubHTTPError as error:
            if error.response.status_code != 416:  # 416: the file ends where this partial one does
                raise
            partial.unlink()
            raise HubError(
                f"{file.name} ends after {have} bytes and the Hub promises {whole}: it was deleted, run the "
                "same command again later."
            ) from error
        except transport_error() as error:
            if _size_of(partial) == have or time.monotonic() - started > TIMEOUT:
                raise HubUnreachable(
                    f"The download of {file.name} stopped at {size(_size_of(partial))} of {size(whole)} "
                    f"({reason_of(error)}): check the network and run the same command again, it goes on "
                    "from there."
                ) from error
            time.sleep(0.5)


def _stream(url: str, partial: Path, have: int, report: Callable[[int], None]) -> None:
    """One GET of the bytes from `have` on; a server that ignores the range starts the file over."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    headers = {**build_hf_headers(library_name="tinyserve"), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout = (CONNECT_TIMEOUT, TIMEOUT, TIMEOUT, TIMEOUT)  # connect, read, write, pool
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as answer:
        hf_raise_for_status(answer)
        append(answer, partial, have, report)


def _check(path: Path, file: RemoteFile, *, whole: bool) -> None:
    """A file is as long as the Hub and its own header say; one that was resumed also has the Hub's sha256."""
    again = "it was deleted, run the same command again."
    if file.name.endswith(".safetensors"):
        with path.open("rb") as stream:
            header = stream.read(8)
            try:
                length = int.from_bytes(header, "little")
                tensors = json.loads(stream.read(min(length, file.size or 0)))
                ends = (tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__")
                expected = 8 + length + max(ends, default=0)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
                raise HubError(f"{file.name} has no safetensors header: {again}") from error
        if expected != file.size:
            raise HubError(f"{file.name} has {file.size} bytes and its header promises {expected}: {again}")
    if whole and file.etag and len(file.etag) == 64:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != file.etag:
            raise HubError(f"{file.name} has sha256 {digest[:12]} and the Hub says {file.etag[:12]}: {again}")


def _partial(blobs: Path, file: RemoteFile) -> Path:
    return blobs / f"{file.etag}.incomplete"


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
