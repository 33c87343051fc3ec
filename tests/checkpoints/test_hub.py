"""The hub, with the real huggingface_hub client on a loopback Hub."""

import errno
import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import checkpoints
import pytest
from fake_hub import FakeHub

from tinyserve import LLM
from tinyserve.checkpoints import presets
from tinyserve.checkpoints.hub import cache, cached, download, is_cached, package_index, remove, resolve
from tinyserve.checkpoints.hub.patience import within
from tinyserve.errors import CheckpointError, HubError, HubUnreachable, UnknownModelError, UserError
from tinyserve.progress import silent

DEFAULT_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"


def safetensors(size: int, seed: int = 0) -> bytes:
    """A file with one tensor of `size` bytes that differ from file to file."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    block = hashlib.sha256(bytes([seed])).digest()
    return struct.pack("<Q", len(header)) + header + (block * (size // 32 + 1))[:size]


def make_repo(root: Path, repo: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = root / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


SINGLE = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": safetensors(300_000),
}
SHARDED = {
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": safetensors(1000, 1),
    "model-00002-of-00002.safetensors": safetensors(2000, 2),
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "consolidated.safetensors": safetensors(3000),
    "onnx/model.safetensors": safetensors(10),
    "original/params.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "training_args.bin": b"pickle",
    "README.md": b"readme",
}


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import huggingface_hub
    from huggingface_hub import constants

    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_HUB_CACHE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TINYSERVE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub(tmp_path / "hub") as server:
        make_repo(server.root, "owner/single", SINGLE)
        make_repo(server.root, "owner/sharded", SHARDED)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---- what is downloaded, and where it goes


def test_only_the_files_a_model_needs_are_downloaded(hub: FakeHub) -> None:
    folder = resolve("owner/sharded")
    needless = {"consolidated.safetensors", "onnx/model.safetensors", "original/params.json", "README.md"}
    assert names_in(folder) == set(SHARDED) - needless - {"pytorch_model.bin", "training_args.bin"}
    assert all((folder / name).read_bytes() == SHARDED[name] for name in names_in(folder))


def test_huggingface_hub_recognises_what_was_downloaded(hub: FakeHub) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir

    folder = resolve("owner/single")
    local = hf_hub_download("owner/single", "model.safetensors", cache_dir=cache.hub_cache(), local_files_only=True)
    assert Path(local) == folder / "model.safetensors"
    (repo,) = scan_cache_dir(cache.hub_cache()).repos
    assert (repo.repo_id, repo.nb_files, len(repo.revisions)) == ("owner/single", 3, 1)


def test_what_huggingface_hub_downloaded_is_used(hub: FakeHub) -> None:
    from huggingface_hub import snapshot_download

    theirs = snapshot_download("owner/single", endpoint=hub.url, cache_dir=cache.hub_cache())
    hub.requests.clear()
    assert resolve("owner/single") == Path(theirs)
    assert hub.requests == []


def test_a_second_resolve_asks_nothing_and_imports_nothing(hub: FakeHub) -> None:
    folder = resolve("owner/single")
    hub.requests.clear()
    code = "import sys; from tinyserve.checkpoints.hub import resolve; print(resolve('owner/single'));"
    code += "assert 'huggingface_hub' not in sys.modules and 'rich' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(folder)
    assert hub.requests == []


def test_a_download_in_a_notebook_without_ipywidgets_warns_of_nothing(hub: FakeHub) -> None:
    code = """
import sys, types, warnings
shell = types.SimpleNamespace(config={"IPKernelApp": {}})
sys.modules["IPython"] = sys.modules["ipykernel.zmqshell"] = types.SimpleNamespace(get_ipython=lambda: shell)
sys.modules["ipywidgets"] = None
warnings.simplefilter("always")
from tinyserve.checkpoints.hub import resolve
from tinyserve.progress import LoadProgress
with LoadProgress("owner/single") as progress:
    resolve("owner/single", progress=progress)
assert "huggingface_hub.file_download" in sys.modules and "tqdm.auto" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Warning" not in done.stderr
    assert "Downloaded owner/single" in done.stderr


def test_a_preset_is_its_repository_at_its_pinned_revision(hub: FakeHub) -> None:
    make_repo(hub.root, DEFAULT_REPO, SINGLE)
    preset = presets.get("smollm2-135m")
    assert resolve("smollm2-135m").name == preset.revision
    assert is_cached("smollm2-135m")
    assert not is_cached("gpt2")


@pytest.mark.parametrize("ask", [{"model": "owner/single@v2"}, {"model": "owner/single", "revision": "v2"}])
def test_a_revision_is_named_in_two_ways(hub: FakeHub, ask: dict[str, str]) -> None:
    hub.branches.add("v2")
    assert resolve(**ask).name == hub.commit  # type: ignore[arg-type]
    assert cache.commit_of("owner/single", "v2") == hub.commit
    assert cache.commit_of("owner/single", "main") is None


def test_one_gguf_of_many(hub: FakeHub) -> None:
    make_repo(hub.root, "owner/ggufs", {"a-Q4.gguf": b"GGUF4", "a-Q8.gguf": b"GGUF8", "README.md": b""})
    path = resolve("owner/ggufs/a-Q8.gguf")
    assert path.read_bytes() == b"GGUF8"
    assert hub.served("a-Q4.gguf") == []
    with pytest.raises(HubError, match=r"has no b\.gguf: it has a-Q4\.gguf, a-Q8\.gguf"):
        resolve("owner/ggufs/b.gguf")


def test_a_repository_of_ggufs_names_the_commands(hub: FakeHub) -> None:
    make_repo(hub.root, "owner/ggufs", {"a-Q4.gguf": b"GGUF4", "a-Q8.gguf": b"GGUF8"})
    with pytest.raises(HubError, match=r"choose one, as in `tinyserve pull owner/ggufs/a-Q4\.gguf`"):
        resolve("owner/ggufs")
    make_repo(hub.root, "owner/one", {"a.gguf": b"GGUF"})
    assert resolve("owner/one").name == "a.gguf"


PARTS = {f"Q8/a-{i:05}-of-00003.gguf": b"GGUF" + bytes(i) for i in (1, 2, 3)}


def test_a_gguf_in_parts_is_one_model(hub: FakeHub) -> None:
    """Downloaded, listed and removed as a whole, by whichever part it is called."""
    make_repo(hub.root, "owner/parts", PARTS | {"Q4/a.gguf": b"GGUF4"})
    first, second, third = PARTS
    assert not is_cached(f"owner/parts/{first}")
    path = resolve(f"owner/parts/{second}")
    assert path.as_posix().endswith(first) and names_in(path.parent.parent) == set(PARTS)
    assert resolve(f"owner/parts/{third}") == path and is_cached(f"owner/parts/{first}")
    [model] = cached()
    assert (model.name, model.path, model.bytes) == (f"owner/parts/{first}", path, sum(map(len, PARTS.values())))
    (path.parent.parent / third).unlink()
    assert cached() == [] and not is_cached(f"owner/parts/{first}")
    assert resolve(f"owner/parts/{first}") == path and is_cached(f"owner/parts/{first}")
    assert remove(f"owner/parts/{second}") == model.bytes and cached() == []
    hub.root.joinpath("owner/parts", third).unlink()
    with pytest.raises(HubError, match=rf"has no {third}: it has "):
        resolve(f"owner/parts/{first}")


def test_a_repository_of_one_gguf_in_parts_needs_no_name_of_a_file(hub: FakeHub) -> None:
    parts = {name.removeprefix("Q8/"): content for name, content in PARTS.items()}
    make_repo(hub.root, "owner/one", parts)
    assert resolve("owner/one").name == "a-00001-of-00003.gguf" and names_in(resolve("owner/one").parent) == set(parts)
    make_repo(hub.root, "owner/two", parts | {"b.gguf": b"GGUF"})
    with pytest.raises(HubError, match=r"holds 2 GGUF files: choose one, as in .*a-00001-of-00003\.gguf`, .*b\.gguf"):
        resolve("owner/two")


def test_an_index_that_leaves_its_folder_is_not_followed(hub: FakeHub) -> None:
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    make_repo(hub.root, "owner/index", SHARDED | {"model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(HubError, match=r"'weight_map' says .* Tell the authors of owner/index"):
        resolve("owner/index")


def test_names_cannot_leave_the_cache(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownModelError):
        resolve("owner/single/../../outside.gguf")
    config = hub.root / "owner/single/config.json"
    hostile = {"config.json": config, "../model.safetensors": config, "/model.safetensors": config}
    monkeypatch.setattr(hub, "files", lambda _: hostile)
    with pytest.raises(HubError, match="holds no safetensors"):
        resolve("owner/single")


def test_pickles_are_refused(hub: FakeHub) -> None:
    make_repo(hub.root, "owner/pickles", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(HubError, match=r"only as pickles \(pytorch_model\.bin\)"):
        resolve("owner/pickles")
    assert hub.served("pytorch_model.bin") == []


def test_an_incomplete_snapshot_is_completed(hub: FakeHub) -> None:
    folder = resolve("owner/sharded")
    (folder / "model-00002-of-00002.safetensors").resolve().unlink()
    hub.requests.clear()
    assert resolve("owner/sharded") == folder
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == safetensors(2000, 2)
    assert [r.path for r in hub.served() if "/resolve/" in r.path] == [
        f"/owner/sharded/resolve/{hub.commit}/model-00002-of-00002.safetensors"
    ]


def test_two_at_once_download_once(hub: FakeHub) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve("owner/single"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(hub.served("model.safetensors")) == 1


# ---- interruptions


def test_an_interrupted_download_goes_on_at_the_next_call(hub: FakeHub) -> None:
    hub.dies_after = 100_000
    with pytest.raises(HubError, match=r"stopped at 100.0 kB of 300.1 kB .*run the same command again"):
        resolve("owner/single")
    assert cache.find("owner/single", "main") is None
    hub.dies_after = None
    hub.requests.clear()
    folder = resolve("owner/single")
    (get,) = hub.served("model.safetensors")
    start = int(get.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    assert get.status == 206
    assert 99_000 < start < 100_001
    assert (folder / "model.safetensors").read_bytes() == SINGLE["model.safetensors"]
    assert hub.served("tokenizer.json") == []


def test_a_cut_connection_goes_on_in_the_same_call(hub: FakeHub) -> None:
    hub.cut_once = 100_000
    folder = resolve("owner/single")
    assert [get.status for get in hub.served("model.safetensors")] == [200, 206]
    assert (folder / "model.safetensors").read_bytes() == SINGLE["model.safetensors"]


def test_a_server_without_ranges_starts_over(hub: FakeHub) -> None:
    hub.cut_once, hub.ignores_range = 100_000, True
    folder = resolve("owner/single")
    assert [get.status for get in hub.served("model.safetensors")] == [200, 200]
    assert (folder / "model.safetensors").read_bytes() == SINGLE["model.safetensors"]


def test_a_resumed_file_is_hashed(hub: FakeHub) -> None:
    blobs = cache.repo_folder("owner/single") / "blobs"
    blobs.mkdir(parents=True)
    sha = hashlib.sha256(SINGLE["model.safetensors"]).hexdigest()
    damaged = bytearray(SINGLE["model.safetensors"][:200_000])
    damaged[150_000] ^= 1
    (blobs / f"{sha}.incomplete").write_bytes(damaged)
    with pytest.raises(HubError, match=r"sha256 .* it was deleted, run the same command again"):
        resolve("owner/single")
    assert (resolve("owner/single") / "model.safetensors").read_bytes() == SINGLE["model.safetensors"]


def test_a_file_shorter_than_promised(hub: FakeHub) -> None:
    hub.wrong_sizes = True
    with pytest.raises(HubError, match=r"ends after .* bytes and the Hub promises"):
        resolve("owner/single")


def test_a_file_shorter_than_its_own_header_promises(hub: FakeHub) -> None:
    make_repo(hub.root, "owner/short", SINGLE | {"model.safetensors": safetensors(1000)[:-1]})
    with pytest.raises(HubError, match=r"model\.safetensors has \d+ bytes and its header promises \d+"):
        resolve("owner/short")
    make_repo(hub.root, "owner/html", SINGLE | {"model.safetensors": b"<html>not found</html>"})
    with pytest.raises(HubError, match="no safetensors header"):
        resolve("owner/html")
    assert cache.find("owner/html", "main") is None


# ---- who may read, and what exists


def test_a_gated_repository_without_and_with_tokens(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("owner/single")
    with pytest.raises(HubError, match=r"is gated: accept its licence at http.*/owner/single, then set HF_TOKEN"):
        resolve("owner/single")
    monkeypatch.setenv("HF_TOKEN", "hf_somebody")
    with pytest.raises(HubError, match="is gated and your token has no access"):
        resolve("owner/single")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert resolve("owner/single").is_dir()


def test_the_token_stays_with_the_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated.add("owner/single")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    with FakeHub(hub.root) as storage:
        hub.storage = storage.url
        storage.cut_once = 100_000
        folder = resolve("owner/single")
        first, second = storage.requests
    assert (folder / "model.safetensors").read_bytes() == SINGLE["model.safetensors"]
    assert not {"authorization", "Authorization"} & {*first.headers, *second.headers}
    assert second.status == 206


def test_private_missing_and_refused(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.private.add("owner/single")
    with pytest.raises(HubError, match=r"There is no repository owner/single at .* or it is private"):
        resolve("owner/single")
    with pytest.raises(HubError, match="There is no repository owner/nothing"):
        resolve("owner/nothing")
    with pytest.raises(HubError, match="owner/sharded has no revision 'v9'"):
        resolve("owner/sharded", revision="v9")
    monkeypatch.setenv("HF_TOKEN", "hf_invalid")
    with pytest.raises(HubError, match=r"refuses the token \(401\)"):
        resolve("owner/sharded")


def test_an_unknown_name_gets_the_nearest_preset_without_a_network(hub: FakeHub) -> None:
    with pytest.raises(UnknownModelError, match=r"Did you mean gpt2.* The presets are .*smollm2-135m"):
        resolve("gtp2")
    assert hub.requests == []


# ---- no network, no room


@pytest.mark.usefixtures("no_hub")
def test_nobody_listens() -> None:
    started = time.monotonic()
    with pytest.raises(HubUnreachable, match=r"cannot be reached .*HF_ENDPOINT to a mirror, or give a local folder"):
        resolve("owner/single")
    assert time.monotonic() - started < 5


def test_a_hub_that_does_not_answer(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert download.TIMEOUT + 1 < 10
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    hub.stalls = True
    with pytest.raises(HubUnreachable, match="cannot be reached"):
        resolve("owner/single")


def test_a_name_lookup_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TimeoutError, match="no answer within"):
        within(0.05, lambda: time.sleep(5))


@pytest.mark.parametrize("status", [403, 404, 407, 429, 500, 503])
def test_a_proxy_or_a_broken_hub(hub: FakeHub, status: int) -> None:
    hub.status = status
    with pytest.raises(HubUnreachable, match=f"HTTP {status}"):
        resolve("owner/single")


def test_a_portal_that_answers_everything(hub: FakeHub) -> None:
    hub.status = 200
    with pytest.raises(HubUnreachable, match="the answer is not the Hub's"):
        resolve("owner/single")


def test_a_full_disk_before_and_during(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = download.shutil.disk_usage("/")
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(HubError, match=r"owner/single needs 300.1 kB more, and 1\.0 kB are free; make room"):
            resolve("owner/single")
    assert not [r for r in hub.served() if "/resolve/" in r.path]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(download, "_stream", full)
        with pytest.raises(HubError, match="is full: owner/single needs more than is free; make room"):
            resolve("owner/single")


def test_offline_means_no_network_at_all(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve("owner/single")
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(package_index, "download", lambda *_: pytest.fail("the package index was asked"))
    assert resolve("owner/single") == folder
    for name in ("owner/sharded", "smollm2-135m"):
        with pytest.raises(HubError, match=f"HF_HUB_OFFLINE forbids .* run `tinyserve pull {name}` once"):
            resolve(name)
    assert hub.requests == []


# ---- local paths


def test_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_repo(tmp_path, "model", SINGLE)
    make_repo(tmp_path, "gguf", {"a.gguf": b"GGUF", "README.md": b""})
    assert resolve(tmp_path / "model") == tmp_path / "model"
    assert resolve(str(tmp_path / "gguf")) == tmp_path / "gguf/a.gguf"
    assert resolve(tmp_path / "gguf/a.gguf") == tmp_path / "gguf/a.gguf"
    monkeypatch.chdir(tmp_path)
    assert resolve("model") == Path("model")


@pytest.mark.parametrize(
    ("files", "ask", "says"),
    [
        ({"notes.txt": b""}, "", "has no config.json: give a folder with config.json"),
        ({"a.gguf": b"", "b.gguf": b""}, "", r"holds 2 GGUF files \(a.gguf, b.gguf\)"),
        ({"config.json": b"", "pytorch_model.bin": b""}, "", "only as pickles"),
        (SINGLE, "model.safetensors", "is one file of a model: give its folder"),
        ({"notes.txt": b"text"}, "notes.txt", "is no GGUF file"),
        ({"a.gguf": b""}, "b.gguf", "There is no file or folder"),
        ({"a.gguf": b""}, "no/folder", "There is no file or folder"),
    ],
)
def test_local_paths_that_hold_no_model(tmp_path: Path, files: dict[str, bytes], ask: str, says: str) -> None:
    make_repo(tmp_path, "folder", files)
    with pytest.raises(CheckpointError, match=says):
        resolve(str(tmp_path / "folder" / ask))


def test_a_folder_that_only_shares_a_presets_name(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_repo(hub.root, "openai-community/gpt2", SINGLE)
    (tmp_path / "work/gpt2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert resolve("gpt2").name == presets.get("gpt2").revision
    (tmp_path / "work/gpt2").rmdir()
    (tmp_path / "work/gpt2").write_text("what somebody has redirected an answer into")
    assert resolve("gpt2").name == presets.get("gpt2").revision


# ---- listing and removing


def test_cached_and_remove(hub: FakeHub) -> None:
    make_repo(hub.root, DEFAULT_REPO, SINGLE)
    make_repo(hub.root, "owner/ggufs", {"a.gguf": b"GGUF4", "b.gguf": b"GGUF8"})
    for name in ("smollm2-135m", "owner/sharded", "owner/ggufs/a.gguf", "owner/ggufs/b.gguf"):
        resolve(name, progress=silent)
    assert [model.name for model in cached()] == [
        "owner/ggufs/a.gguf",
        "owner/ggufs/b.gguf",
        "owner/sharded",
        "smollm2-135m",
    ]
    sizes = {model.name: model.bytes for model in cached()}
    assert sizes["smollm2-135m"] == sum(map(len, SINGLE.values()))
    assert remove("owner/ggufs/a.gguf") == 5
    assert remove("smollm2-135m") == sizes["smollm2-135m"]
    assert [model.name for model in cached()] == ["owner/ggufs/b.gguf", "owner/sharded"]
    with pytest.raises(UserError, match="is not among the downloaded models"):
        remove("smollm2-135m")
    with pytest.raises(UserError, match="is a path of yours"):
        remove(str(hub.root))
    assert remove("owner/sharded@main") == sizes["owner/sharded"] - 2  # two files "{}" are one blob
    assert [model.name for model in cached()] == ["owner/ggufs/b.gguf"]


def test_an_empty_cache_is_an_empty_list() -> None:
    assert cached() == []


def test_an_unfinished_download_can_be_removed(hub: FakeHub) -> None:
    hub.dies_after = 100_000
    with pytest.raises(HubError):
        resolve("owner/single", progress=silent)
    assert remove("owner/single") > 90_000


# ---- what is said meanwhile


def test_progress_goes_to_stderr_or_nowhere(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    resolve("owner/single")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["Downloading owner/single (300.1 kB)", "Downloaded owner/single in 0 s"]
    resolve("owner/sharded", progress=silent)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    resolve("owner/single")
    said = capsys.readouterr()
    assert said.out == ""
    assert "owner/single |" in said.err and "of 300.1 kB" in said.err
    assert said.err.split("\r")[-1] == "Downloaded owner/single in 0 s\n"  # the bar is gone


def test_an_llm_hears_of_its_download_and_the_terminal_does_not(
    hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints.write_folder(hub.root / "owner/tiny", checkpoints.CONFIGS["llama"])
    total = sum(path.stat().st_size for path in (hub.root / "owner/tiny").iterdir())
    heard: list[tuple[str, int, int]] = []
    LLM("owner/tiny", dtype="float32", progress=lambda *told: heard.append(told))
    downloads = [told for told in heard if told[0].startswith("download")]
    assert heard[: len(downloads)] == downloads  # what is loaded was downloaded before
    assert (downloads[0], downloads[-1]) == (("download owner/tiny", 0, total), ("download owner/tiny", total, total))
    assert [done for _, done, _ in downloads] == sorted(done for _, done, _ in downloads)
    assert {told[0].split()[0] for told in heard} <= {"download", "compile", "load"}
    assert capsys.readouterr().err == ""


def test_whoever_waits_for_another_download_is_told(hub: FakeHub) -> None:
    from filelock import FileLock

    lock = FileLock(cache.hub_cache() / ".locks/models--owner--single/tinyserve.lock")
    Path(lock.lock_file).parent.mkdir(parents=True)
    heard: list[tuple[str, int, int]] = []

    def hear(*told: object) -> None:
        heard.append(told)  # type: ignore[arg-type]
        lock.release()

    lock.acquire()
    resolve("owner/single", progress=hear)
    assert heard[0] == ("wait download owner/single", 0, 0)
    assert heard[-1][0] == "download owner/single"
