"""`pull`, `list` and `rm` against a loopback Hub: the path on stdout, the talk on stderr."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from command_line import Terminal, last_line
from fake_hub import FakeHub
from typer.testing import CliRunner

from tinyserve.checkpoints.hub import packaged
from tinyserve.cli.list_ import list_models
from tinyserve.cli.pull import pull
from tinyserve.cli.rm import rm
from tinyserve.errors import HubError, UserError

app = typer.Typer()
app.command("pull")(pull)
app.command("list")(list_models)
app.command("rm")(rm)
runner = CliRunner()

HEADER = b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + b"abcd"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = tmp_path / "hub/owner/name"
    folder.mkdir(parents=True)
    for name, data in {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": WEIGHTS}.items():
        (folder / name).write_bytes(data)
    for name in (
        "HF_TOKEN",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("TINYSERVE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with FakeHub(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_pull_prints_the_path_alone_on_stdout() -> None:
    result = runner.invoke(app, ["pull", "owner/name"])
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    assert (Path(line) / "model.safetensors").read_bytes() == WEIGHTS
    assert "Downloading owner/name" in result.stderr
    again = runner.invoke(app, ["pull", "owner/name", "--revision", "main"])
    assert (again.stdout, again.stderr) == (result.stdout, "")


def test_ctrl_c_in_a_download_leaves_the_terminal_clean(hub: FakeHub, tmp_path: Path) -> None:
    with FakeHub(tmp_path / "hub") as storage, Terminal("pull", "owner/name") as terminal:
        storage.stalls, hub.storage = True, storage.url
        terminal.wait_for("owner/name |")
        terminal.type("\x03")
        assert terminal.end() == 130
    assert "Traceback" not in terminal.shown
    assert last_line("\r" + terminal.shown.replace("^C", "")) == ""


def test_pull_without_a_hub_is_an_error_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{probe.getsockname()[1]}")
    result = runner.invoke(app, ["pull", "owner/name"])
    assert isinstance(result.exception, HubError)
    assert "cannot be reached" in str(result.exception)


def test_list_shows_name_size_and_path() -> None:
    header, *rows, last = runner.invoke(app, ["list"]).stdout.splitlines()
    assert [row.split()[0] for row in rows] == [model.name for model in packaged()]
    assert last.startswith("No model is downloaded yet")
    path = runner.invoke(app, ["pull", "owner/name"]).stdout.strip()
    header, row, *others = runner.invoke(app, ["list"]).stdout.splitlines()
    assert len(others) == len(rows)
    assert header.split() == ["name", "size", "where"]
    assert row.split() == ["owner/name", str(len(WEIGHTS) + 4), "bytes", path]
    entry, *others = json.loads(runner.invoke(app, ["list", "--json"]).stdout)
    assert {other["source"] for other in others} == {"package"}
    assert (entry["name"], entry["bytes"], entry["path"], entry["source"]) == (
        "owner/name",
        len(WEIGHTS) + 4,
        path,
        "hub",
    )


def test_list_presets_says_which_are_here_and_which_are_gated() -> None:
    rows = {row["name"]: row for row in json.loads(runner.invoke(app, ["list", "--presets", "--json"]).stdout)}
    assert rows["gpt2"]["repo"] == "openai-community/gpt2"
    assert {row["name"] for row in rows.values() if row["downloaded"]} == {model.name for model in packaged()}
    text = runner.invoke(app, ["list", "--presets"]).stdout
    assert len(text.splitlines()) == len(rows) + 1
    assert any("gated" in line for line in text.splitlines() if line.startswith("llama-3.1-8b"))


def test_rm_wants_a_yes() -> None:
    path = Path(runner.invoke(app, ["pull", "owner/name"]).stdout.strip())
    refused = runner.invoke(app, ["rm", "owner/name"])
    assert isinstance(refused.exception, UserError)
    assert "add --yes" in str(refused.exception)
    assert path.is_dir()
    result = runner.invoke(app, ["rm", "owner/name", "--yes"])
    assert result.exit_code == 0
    assert "Removed owner/name" in result.stderr
    assert not path.exists()
    assert isinstance(runner.invoke(app, ["rm", "owner/name", "--yes"]).exception, UserError)


def test_rm_of_what_is_not_there_says_so_before_it_asks() -> None:
    runner.invoke(app, ["pull", "owner/name"])
    error = runner.invoke(app, ["rm", "owner/nam"]).exception
    assert isinstance(error, UserError)
    assert error.exit_code == 2
    assert str(error) == (
        "owner/nam is not among the downloaded models: did you mean owner/name? `tinyserve list` shows them."
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpt2", "gpt2 is not among the downloaded models"),  # a preset
        ("qwen", "qwen is not among the downloaded models"),  # a family
        ("owner/other", "owner/other is not among the downloaded models"),
        ("owner/name@other", "owner/name@other is not among the downloaded models"),
        ("/nowhere/model.gguf", "/nowhere/model.gguf is not among the downloaded models"),
        (".", ". is a path of yours"),
        ("", "The name of what is to be removed is empty"),
    ],
)
def test_rm_asks_about_nothing_that_is_not_there(hub: FakeHub, name: str, says: str) -> None:
    runner.invoke(app, ["pull", "owner/name"])
    with Terminal("rm", name) as terminal:
        assert terminal.end() == 2
    assert terminal.shown.startswith(f"tinyserve: {says}")
    assert "[y/N]" not in terminal.shown


def test_rm_tells_the_bytes_that_others_share(tmp_path: Path) -> None:
    path = Path(runner.invoke(app, ["pull", "owner/name"]).stdout.strip())
    (tmp_path / "second-name").hardlink_to((path / "model.safetensors").resolve())
    result = runner.invoke(app, ["rm", "owner/name", "--yes"])
    assert result.stderr == "Removed owner/name: 2 bytes freed; 65 bytes stay, which others in the cache share.\n"


@pytest.mark.parametrize("command", ["pull", "list", "rm"])
def test_help_has_examples(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert f"tinyserve {command}" in result.stdout
