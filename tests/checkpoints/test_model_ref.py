"""What a name means: one order for a path, a preset and a repository, and one answer for every command."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from command_line import Shell

from tinyserve import LLM
from tinyserve.checkpoints import presets
from tinyserve.checkpoints.model_ref import ModelRef
from tinyserve.errors import CheckpointError, HubError, UnknownModelError, UserError
from tinyserve.server.pool import ServedModel
from tinyserve.server.run import ServeOptions, serve
from tinyserve.server.status import _inspection


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with no download and no network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


# --- what is parsed ---------------------------------------------------------------------------------------------------


def test_presets_and_repositories() -> None:
    gpt2 = presets.get("gpt2")
    assert ModelRef.parse("gpt2") == ModelRef("gpt2", preset=gpt2, repo=gpt2.repo)
    assert ModelRef.parse("gpt2").revision_in_force == gpt2.revision
    assert ModelRef.parse("gpt2@v1").revision_in_force == ModelRef.parse("gpt2", "v1").revision_in_force == "v1"
    assert ModelRef.parse("o/n") == ModelRef("o/n", repo="o/n")
    assert ModelRef.parse("o/n").revision_in_force == "main"
    assert ModelRef.parse("o/n@v2") == ModelRef("o/n@v2", repo="o/n", revision="v2")
    assert ModelRef.parse("o/n/q/a.gguf") == ModelRef("o/n/q/a.gguf", repo="o/n", file="q/a.gguf")
    assert [ModelRef.parse(name).label for name in ("gpt2@v1", "o/n@v2", "o/n/a.gguf")] == ["gpt2", "o/n", "o/n/a.gguf"]
    assert ModelRef.parse("smollm2-135m").is_default and not ModelRef.parse("smollm2-135m@main").is_default


def test_a_path_that_exists_comes_first(here: Path) -> None:
    for name in ("gpt2", "owner/name", "gpt2@v1"):
        folder = here / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        assert ModelRef.parse(name) == ModelRef(name, Path(name))
    (here / "a.gguf").write_bytes(b"GGUF")
    assert ModelRef.parse("a.gguf").path == Path("a.gguf")
    (here / "one").mkdir()
    (here / "a.gguf").rename(here / "one/a.gguf")
    assert ModelRef.parse("one").path == Path("one/a.gguf")
    assert ModelRef.parse("gpt2/config.json").path == Path("gpt2/config.json")  # for those who read configs
    download = ModelRef.parse_download("gpt2")
    assert download is not None and download.preset == presets.get("gpt2")


@pytest.mark.parametrize("content", [None, "an answer that was redirected", "two GGUF files"])
def test_what_only_has_a_presets_name_is_no_path(here: Path, content: str | None) -> None:
    if content is not None and "GGUF" not in content:
        (here / "gpt2").write_text(content)
    else:
        (here / "gpt2").mkdir()
        for name in ("a.gguf", "b.gguf") if content else ():
            (here / "gpt2" / name).write_bytes(b"GGUF")
    assert ModelRef.parse("gpt2").preset == presets.get("gpt2")


@pytest.mark.parametrize("name", ["./none", "/none/here", "~/none", "none.gguf", "owner/none.gguf", Path("gpt2")])
def test_a_path_that_does_not_exist(name: Any) -> None:
    with pytest.raises(CheckpointError, match=r"There is no file or folder .*: check the path"):
        ModelRef.parse(name)


@pytest.mark.parametrize("name", ["gtp2", "", "Hello you", "a/b/c", "o/n@v 1", "x", "x" * 5000, "a\0b"])
def test_what_is_nothing(name: str) -> None:
    with pytest.raises(UnknownModelError, match="it is no preset, no folder with"):
        ModelRef.parse(name)


# --- one answer for every command -------------------------------------------------------------------------------------


class Asked(UserError):
    """Raised with the source of a config in place of what would be done with it."""


def _said(shell: Shell, *arguments: str) -> str:
    return shell(*arguments).sentence.removesuffix(".")


def _llm(**options: Any) -> str:
    with pytest.raises(Asked) as asked:
        LLM("gpt2", **options)
    return str(asked.value).removesuffix(".")


def _served() -> str:
    source: str = _inspection(ServedModel("gpt2", "gpt2"))["source"]
    return source


COMMANDS: dict[str, Callable[[Shell], str]] = {
    "ask": lambda shell: _said(shell, "ask", "gpt2", "Hello"),
    "chat": lambda shell: _said(shell, "chat", "gpt2"),
    "bench": lambda shell: _said(shell, "bench", "gpt2", "--quick"),
    "eval": lambda shell: _said(shell, "eval", "gpt2", "--text", "text.txt"),
    "eval --task": lambda shell: _said(shell, "eval", "gpt2", "--task", "cloze"),
    "quantize": lambda shell: _said(shell, "quantize", "gpt2", "out"),
    "warmup": lambda shell: _said(shell, "warmup", "gpt2"),
    "pull": lambda shell: shell("pull", "gpt2").out.strip() + "/config.json",
    "inspect-config": lambda shell: json.loads(shell("inspect-config", "gpt2", "--json").out)["source"],
    "compare": lambda shell: _said(shell, "compare", "gpt2"),
    "serve": lambda _: _served(),
    "LLM": lambda _: _llm(),
    "LLM(load_format='dummy')": lambda _: _llm(load_format="dummy"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_means_the_same(command: str, here: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that holds ./gpt2/config.json, that is the model."""

    def parse(raw: dict[str, Any], source: str) -> Any:
        raise Asked(f"{source}.")

    checkpoints.write_folder(here / "gpt2", checkpoints.CONFIGS["gpt2"])
    (here / "text.txt").write_text("Some words to read.")
    monkeypatch.setattr("tinyserve.loading.parse_config", parse)
    monkeypatch.setattr(sys.modules["tinyserve.cli.compare"], "parse_config", parse)
    assert COMMANDS[command](shell) == "gpt2/config.json"


def test_a_server_takes_what_a_command_takes(here: Path) -> None:
    for name, says in (("gtp2", "Did you mean gpt2"), ("./none", "no file or folder"), (".", "has no config.json")):
        with pytest.raises(UserError, match=says):
            serve(ServeOptions(models={"m": name}))


def test_synthetic_weights_take_any_config(here: Path) -> None:
    checkpoints.write_folder(here / "gpt2", checkpoints.CONFIGS["gpt2"])
    gguf = checkpoints.write_model_gguf(here / "model.gguf", checkpoints.CONFIGS["gpt2"])
    sizes = {LLM(name, load_format="dummy", max_model_len=8).config.hidden_size
             for name in ("gpt2", "gpt2/config.json", gguf)}  # fmt: skip
    assert sizes == {checkpoints.CONFIGS["gpt2"]["n_embd"]}
    with pytest.raises(UnknownModelError):
        LLM("owner/name", load_format="dummy")
    with pytest.raises(HubError, match="gpt2-medium is not on this disk"):
        LLM("gpt2-medium")
