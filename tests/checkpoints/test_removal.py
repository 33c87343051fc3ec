"""What `tinyserve rm` deletes of caches as old and new versions of huggingface_hub write them, and what stays."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from huggingface_hub import scan_cache_dir

from tinyserve.checkpoints import presets
from tinyserve.checkpoints.hub import cache, cached, planned_removal, remove
from tinyserve.errors import HubError, UserError

OLD, NEW = "1" * 40, "2" * 40  # commits
CONFIG, TOKENIZER, WEIGHTS = b'{"model_type": "llama"}', b'{"a": 1}', b"w" * 3000
MODEL = {"config.json": CONFIG, "tokenizer.json": TOKENIZER, "model.safetensors": WEIGHTS}
BYTES = sum(map(len, MODEL.values()))


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of an empty cache."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TINYSERVE_CACHE", str(tmp_path / "own"))
    folder = tmp_path / "hf/hub"
    folder.mkdir(parents=True)
    yield folder


def write(
    repo: str, commit: str, files: dict[str, bytes], *refs: str, symlinks: bool = True, shared: bool = False
) -> Path:
    """A snapshot as huggingface_hub lays it out: blobs and links to them, or the files themselves without symlinks.

    `shared` keeps weights in the blobs of the whole cache, as huggingface_hub 2 does with what comes through Xet.
    """
    folder = cache.repo_folder(repo)
    for name, data in files.items():
        entry = folder / "snapshots" / commit / name
        entry.parent.mkdir(parents=True, exist_ok=True)
        if not symlinks:
            entry.write_bytes(data)
            continue
        blob = blob_of(repo, data)
        blob.parent.mkdir(exist_ok=True)
        if shared and name.endswith((".safetensors", ".gguf")):
            store = shared_of(data)
            store.parent.mkdir(parents=True, exist_ok=True)
            (cache.hub_cache() / "blobs/.huggingface-shared-blobs").write_text("1\n")
            store.write_bytes(data)
            with store.with_name(f"{store.name}.refs").open("a") as manifest:
                manifest.write(f"{blob.relative_to(cache.hub_cache()).as_posix()}\n")
            if not blob.is_symlink():
                blob.symlink_to(os.path.relpath(store, blob.parent))
        else:
            blob.write_bytes(data)
        entry.symlink_to(os.path.relpath(blob, entry.parent))
    for ref in refs:
        path = folder / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    return folder / "snapshots" / commit


def blob_of(repo: str, data: bytes) -> Path:
    return cache.repo_folder(repo) / "blobs" / hashlib.sha256(data).hexdigest()


def shared_of(data: bytes) -> Path:
    """The blob of the whole cache; Xet's hash is not sha256."""
    name = hashlib.blake2s(data).hexdigest()
    return cache.hub_cache() / "blobs" / name[:2] / name


def stays(folder: Path) -> dict[str, bytes]:
    """The files under a folder that can be read, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_sound() -> bool:
    """Whether huggingface_hub finds nothing wrong with the cache."""
    return not scan_cache_dir(cache.hub_cache()).warnings


@pytest.mark.parametrize("layout", [{}, {"shared": True}, {"symlinks": False}])
def test_a_model_that_is_alone_goes_with_its_folder(layout: dict[str, bool]) -> None:
    write("owner/name", NEW, MODEL, "main", **layout)
    assert planned_removal("owner/name").bytes == BYTES
    assert remove("owner/name") == BYTES
    assert not cache.repo_folder("owner/name").exists()
    assert not shared_of(WEIGHTS).exists()
    assert is_sound()


@pytest.mark.parametrize("layout", [{}, {"shared": True}, {"symlinks": False}])
def test_another_revision_stays_whole_and_what_both_share_stays_once(layout: dict[str, bool]) -> None:
    old = write("owner/name", OLD, MODEL | {"model.safetensors": b"older" * 100}, "v1", **layout)
    write("owner/name", NEW, MODEL, "main", **layout)
    before = stays(old)
    shared = 0 if layout.get("symlinks") is False else len(CONFIG) + len(TOKENIZER)
    assert planned_removal("owner/name").bytes == BYTES
    assert remove("owner/name") == BYTES - shared
    assert stays(old) == before
    assert stays(cache.repo_folder("owner/name") / "refs") == {"v1": OLD.encode()}
    assert is_sound()


def test_a_revision_whose_files_another_one_has_too_frees_nothing() -> None:
    old = write("owner/name", OLD, MODEL)
    write("owner/name", NEW, MODEL, "main")
    assert remove("owner/name") == 0
    assert stays(old) == MODEL


def test_a_revision_is_removed_by_its_commit_and_by_its_branch() -> None:
    write("owner/name", OLD, MODEL, "dev")
    new = write("owner/name", NEW, MODEL | {"model.safetensors": b"newer" * 100}, "main")
    assert [model.name for model in cached()] == ["owner/name", f"owner/name@{OLD}"]
    assert remove("owner/name@dev") == len(WEIGHTS)
    assert stays(new) == MODEL | {"model.safetensors": b"newer" * 100}
    with pytest.raises(UserError, match="did you mean owner/name"):
        remove(f"owner/name@{OLD}")
    assert remove(f"owner/name@{NEW}") == 500 + len(CONFIG) + len(TOKENIZER)


def test_a_preset_is_removed_at_its_own_revision_alone() -> None:
    preset = presets.get("gpt2")
    write(preset.repo, preset.revision, MODEL)
    main = write(preset.repo, OLD, MODEL, "main")
    assert remove("gpt2") == 0
    assert stays(main) == MODEL


@pytest.mark.parametrize("layout", [{}, {"shared": True}, {"symlinks": False}])
def test_files_that_tinyserve_does_not_load_stay_and_so_does_their_reference(layout: dict[str, bool]) -> None:
    others = {"pytorch_model.bin": b"pickle", "onnx/model.safetensors": b"onnx", "a.gguf": b"GGUF"}
    others["consolidated.safetensors"] = b"mistral"
    snapshot = write("owner/name", NEW, MODEL | others, "main", **layout)
    assert remove("owner/name") == BYTES
    assert stays(snapshot) == others
    assert cache.commit_of("owner/name", "main") == NEW
    assert is_sound()


def test_a_shared_blob_stays_as_long_as_another_repository_has_it() -> None:
    write("owner/name", NEW, MODEL, "main", shared=True)
    copy = write("other/copy", NEW, MODEL, "main", shared=True)
    assert planned_removal("owner/name").bytes == BYTES
    assert remove("owner/name") == len(CONFIG) + len(TOKENIZER)
    assert stays(copy) == MODEL
    assert remove("other/copy") == BYTES
    assert not shared_of(WEIGHTS).exists()


def test_a_shared_blob_of_a_single_file_stays_as_long_as_another_repository_has_it() -> None:
    write("owner/ggufs", NEW, {"a.gguf": b"GGUFa", "b.gguf": b"GGUFb"}, "main", shared=True)
    copy = write("other/copy", OLD, {"a.gguf": b"GGUFa"}, "main", shared=True)
    assert remove("owner/ggufs/a.gguf") == 0
    assert stays(copy) == {"a.gguf": b"GGUFa"}
    assert [model.name for model in cached()] == ["other/copy/a.gguf", "owner/ggufs/b.gguf"]
    assert remove("owner/ggufs/b.gguf") == 5


def test_a_copy_of_a_repository_with_the_same_commits_stays() -> None:
    copies = [write(f"owner/copy{i}", NEW, MODEL, "main") for i in range(8)]
    assert remove("owner/copy3") == BYTES
    assert [stays(copy) for copy in copies] == [MODEL if i != 3 else {} for i in range(8)]


def test_one_gguf_of_two_goes_and_the_other_revisions_stay() -> None:
    old = write("owner/ggufs", OLD, {"a.gguf": b"GGUFa"})
    new = write("owner/ggufs", NEW, {"a.gguf": b"GGUFa", "q/b.gguf": b"GGUFbb"}, "main")
    assert remove("owner/ggufs/q/b.gguf") == 6
    assert remove("owner/ggufs/a.gguf") == 0
    assert stays(old) == {"a.gguf": b"GGUFa"}
    assert stays(new) == {}


def test_a_repository_of_ggufs_loses_all_of_them() -> None:
    snapshot = write("owner/ggufs", NEW, {"a.gguf": b"GGUFa", "b.gguf": b"GGUFbb", "README.md": b"read"}, "main")
    assert remove("owner/ggufs") == 11
    assert stays(snapshot) == {"README.md": b"read"}


def test_a_blob_with_a_second_name_elsewhere_frees_nothing(tmp_path: Path) -> None:
    write("owner/name", NEW, MODEL, "main")
    backup = tmp_path / "backup"
    backup.hardlink_to(blob_of("owner/name", WEIGHTS))
    assert remove("owner/name") == len(CONFIG) + len(TOKENIZER)
    assert backup.read_bytes() == WEIGHTS


def test_a_snapshot_of_hard_links_frees_what_has_no_name_left() -> None:
    snapshot = write("owner/name", NEW, MODEL, "main", symlinks=False)
    blob = blob_of("owner/name", WEIGHTS)
    blob.parent.mkdir()
    blob.hardlink_to(snapshot / "model.safetensors")
    assert remove("owner/name") == BYTES


def test_a_link_to_nothing_goes_with_its_model() -> None:
    write("owner/name", NEW, MODEL, "main")
    blob_of("owner/name", WEIGHTS).unlink()
    assert not is_sound()
    assert remove("owner/name") == len(CONFIG) + len(TOKENIZER)
    assert is_sound()


def test_a_link_to_nothing_in_another_revision_is_in_nobodys_way() -> None:
    old = write("owner/name", OLD, MODEL | {"pytorch_model.bin": b"pickle"})
    write("owner/name", NEW, MODEL, "main")
    blob_of("owner/name", b"pickle").unlink()
    assert remove("owner/name") == 0
    assert stays(old) == MODEL
    assert (old / "pytorch_model.bin").is_symlink()


def test_a_link_to_nothing_of_another_repository_is_in_nobodys_way() -> None:
    write("owner/name", NEW, MODEL, "main")
    damaged = write("other/name", OLD, MODEL, "main")
    blob_of("other/name", WEIGHTS).unlink()
    assert remove("owner/name") == BYTES
    assert (damaged / "model.safetensors").is_symlink()


def test_an_interrupted_download_goes_with_the_files_that_were_complete() -> None:
    shards = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    files = {"config.json": CONFIG, "model.safetensors.index.json": shards.encode(), "model-1.safetensors": b"1" * 500}
    write("owner/name", NEW, files)  # the reference is written last
    (blob_of("owner/name", b"2").parent / f"{'e' * 64}.incomplete").write_bytes(bytes(70))
    assert remove("owner/name") == 570 + len(CONFIG) + len(shards)
    assert not cache.repo_folder("owner/name").exists()


def test_an_interrupted_download_of_the_first_file_is_removed_too() -> None:
    partial = cache.repo_folder("owner/name") / "blobs" / f"{'e' * 40}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(70))
    with pytest.raises(UserError, match="an unfinished download is: `tinyserve rm owner/name`"):
        remove("owner/name/a.gguf")
    assert remove("owner/name") == 70
    assert not cache.repo_folder("owner/name").exists()


def test_an_interrupted_download_beside_a_complete_revision_leaves_those_of_others() -> None:
    write("owner/name", NEW, MODEL, "main")
    by_commit = write("owner/name", OLD, MODEL | {"model.safetensors": b"older"})
    partial = cache.repo_folder("owner/name") / "blobs" / f"{'e' * 64}.incomplete"
    partial.write_bytes(bytes(70))
    assert remove("owner/name") == len(WEIGHTS) + 70
    assert stays(by_commit) == MODEL | {"model.safetensors": b"older"}


def test_what_others_are_downloading_stays() -> None:
    write("owner/name", NEW, MODEL, "main")
    blobs = cache.repo_folder("owner/name") / "blobs"
    newest = blobs / f"{'e' * 64}.0123abcd.incomplete"  # huggingface_hub 2
    older = blobs / f"{'f' * 64}.incomplete"  # huggingface_hub 1, which has a lock
    newest.write_bytes(b"new")
    older.write_bytes(b"old")
    lock = cache.hub_cache() / ".locks" / blobs.parent.name / f"{'f' * 64}.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        assert remove("owner/name") == BYTES
    assert stays(blobs) == {newest.name: b"new", older.name: b"old"}
    assert lock.is_file()
    assert remove("owner/name") == 3  # nobody goes on with it any more
    assert stays(blobs) == {newest.name: b"new"}


def test_a_repository_that_was_moved_to_another_disk_is_deleted_there(tmp_path: Path) -> None:
    write("owner/name", NEW, MODEL, "main")
    folder = cache.repo_folder("owner/name")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert remove("owner/name") == BYTES
    assert stays(tmp_path / "elsewhere") == {"refs/main": NEW.encode()}


def test_a_cache_behind_a_link_is_the_same_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "link"))
    write("owner/name", NEW, MODEL, "main", shared=True)
    copy = write("other/copy", NEW, MODEL, "main", shared=True)
    assert remove("owner/name") == len(CONFIG) + len(TOKENIZER)
    assert stays(copy) == MODEL


def test_locks_and_the_marks_of_missing_files_stay() -> None:
    write("owner/name", NEW, MODEL | {"README.md": b"read"}, "main")
    folder = cache.repo_folder("owner/name")
    (folder / ".no_exist" / NEW).mkdir(parents=True)
    (folder / ".no_exist" / NEW / "adapter_config.json").touch()
    (folder / "trees").mkdir()
    (folder / "trees" / f"{NEW}.json").write_text("{}")
    lock = cache.hub_cache() / ".locks" / folder.name / "anything.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert remove("owner/name") == BYTES
    assert lock.is_file()
    assert (folder / ".no_exist" / NEW / "adapter_config.json").is_file()
    assert (folder / "trees" / f"{NEW}.json").is_file()


def test_a_model_that_is_being_downloaded_is_not_removed() -> None:
    snapshot = write("owner/name", NEW, MODEL, "main")
    lock = cache.lock_of("owner/name")
    lock.parent.mkdir(parents=True)
    with FileLock(lock), pytest.raises(UserError, match="is being downloaded by another process: wait for it"):
        remove("owner/name")
    assert stays(snapshot) == MODEL


def test_data_sets_and_spaces_of_the_same_name_stay() -> None:
    write("owner/name", NEW, MODEL, "main")
    data = cache.hub_cache() / "datasets--owner--name/snapshots" / NEW / "config.json"
    data.parent.mkdir(parents=True)
    data.write_bytes(b"data")
    assert remove("owner/name") == BYTES
    assert data.read_bytes() == b"data"


def test_what_another_program_alone_can_load_is_not_removed() -> None:
    snapshot = write("owner/name", NEW, {"consolidated.safetensors": b"mistral", "params.json": b"{}"}, "main")
    with pytest.raises(UserError, match="is not among the downloaded models"):
        remove("owner/name")
    assert len(stays(snapshot)) == 2


def test_a_file_that_cannot_be_deleted_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    write("owner/name", NEW, MODEL | {"README.md": b"read"}, "main")
    plan = planned_removal("owner/name")

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(HubError, match=r"snapshots/2+/.* could not be deleted \(Permission denied\): see who owns it"):
        plan.execute()


def test_what_is_not_there_names_the_nearest_and_other_revisions() -> None:
    write("owner/name", OLD, MODEL, "v1")
    with pytest.raises(UserError, match=rf"did you mean owner/name@{OLD}\? `tinyserve list` shows them"):
        remove("owner/name")
    with pytest.raises(UserError, match="did you mean owner/name@"):
        remove(f"owner/nam@{OLD}")
    with pytest.raises(UserError, match=r"zzz is not among the downloaded models: `tinyserve list` shows them"):
        remove("zzz")
