"""Completion of command lines: what tinyserve answers a shell, and that a real one understands it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
from command_line import PROGRAM, Shell, Terminal, environment

from tinyserve.checkpoints import presets
from tinyserve.cli.ask import FAMILIES

Complete = Callable[..., list[str]]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def complete(shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Complete:
    """What bash gets for a line whose last word is not finished, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("_TINYSERVE_COMPLETE", "complete_bash")

    def ask(line: str) -> list[str]:
        words = line.split(" ")
        monkeypatch.setenv("COMP_WORDS", "\n".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        result = shell()
        assert (result.code, result.err) == (0, "")
        return result.out.split()

    return ask


@pytest.fixture
def program(tmp_path: Path) -> dict[str, str]:
    """An environment in which `tinyserve` is a command, and the shells read no files of their user."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "tinyserve").write_text(f'#!/bin/sh\nexec {sys.executable} -m tinyserve "$@"\n')
    (folder / "tinyserve").chmod(0o755)
    root = str(Path(__file__).parents[2])
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": root, "HOME": str(tmp_path)}


def test_commands_and_options(complete: Complete) -> None:
    assert complete("tinyserve c") == ["chat", "compare", "completion"]
    assert complete("tinyserve ask --te") == ["--temperature", "--temp"]
    assert complete("tinyserve ask gpt2 --system x --te") == ["--temperature", "--temp"]
    assert complete("tinyserve chat --dtype w8") == ["w8a8"]
    assert complete("tinyserve completion ") == ["bash", "zsh", "fish"]


def test_models(complete: Complete, tmp_path: Path) -> None:
    for name in ("small.gguf", "needs quotes.gguf", "smuggled.txt"):
        (tmp_path / name).touch()
    falcons = [name for name in presets.names() if name.startswith("falcon-")]
    for command in ("chat", "bench", "trace", "eval", "inspect-config", "compare gpt2", "pull", "warmup", "quantize"):
        assert complete(f"tinyserve {command} falcon-") == falcons, command
    assert complete("tinyserve ask falcon") == ["falcon", *falcons]
    assert complete("tinyserve ask sm") == [
        "smollm2", *(name for name in presets.names() if name.startswith("smol")), "small.gguf"
    ]  # fmt: skip
    everything = complete("tinyserve ask ")
    assert len(set(everything)) == len(everything)
    assert set(everything) == {*FAMILIES, *presets.names(), "small.gguf"}
    assert complete("tinyserve ask --temp 1 -m gpt2-x") == ["gpt2-xl"]
    assert complete("tinyserve ask falcon -m ") == list(presets.variants("falcon"))


@pytest.mark.parametrize("word", ["./", "models/", "~/", "owner/na", "What"])
def test_paths_are_left_to_the_shell(complete: Complete, word: str) -> None:
    assert complete(f"tinyserve ask {word}") == []


def test_rm_knows_what_is_downloaded(complete: Complete, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("TINYSERVE_CACHE", str(tmp_path / "own"))
    assert complete("tinyserve rm ") == []
    snapshot = tmp_path / "hub/models--owner--name/snapshots" / ("0" * 40)
    checkpoints.write_folder(snapshot, checkpoints.CONFIGS["gpt2"])
    assert complete("tinyserve rm own") == [f"owner/name@{'0' * 40}"]
    main = tmp_path / "hub/models--owner--name/refs/main"
    main.parent.mkdir()
    main.write_text("0" * 40)
    assert complete("tinyserve rm own") == ["owner/name"]


def test_a_folder_that_is_gone(complete: Complete, tmp_path: Path) -> None:
    tmp_path.rmdir()
    assert complete("tinyserve chat gpt2-x") == ["gpt2-xl"]


def test_an_unknown_shell(shell: Shell) -> None:
    result = shell("completion", "tcsh")
    assert result.code == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in result.sentence


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_scripts_ask_this_program(shell: Shell, name: str) -> None:
    script = shell("completion", name)
    assert (script.code, script.err) == (0, "")
    assert f"_TINYSERVE_COMPLETE=complete_{name}" in script.out
    assert "complete" in script.out and "tinyserve" in script.out


def test_bash_fills_its_array(program: dict[str, str]) -> None:
    """The function of the script, called as bash calls it."""
    script = """
        source <(tinyserve completion bash)
        [[ $(complete -p tinyserve) =~ -F\\ ([a-z_]+) ]]
        COMP_WORDS=(tinyserve compare gpt2 smollm2-1); COMP_CWORD=3
        ${BASH_REMATCH[1]} tinyserve smollm2-1 gpt2
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, env=environment(**program), check=True
    )
    assert (done.stdout.split(), done.stderr) == (["smollm2-1.7b", "smollm2-135m"], "")


def test_tab_in_a_terminal(program: dict[str, str]) -> None:
    bash = ("bash", "--norc", "--noprofile", "-i")
    with Terminal(program=bash, PS1="ready> ", **program) as terminal:
        terminal.wait_for("ready> ")
        terminal.type("source <(tinyserve completion bash)\n")
        terminal.wait_for("ready> ")
        terminal.type("tinyserve inspect-config falcon-r\t")
        terminal.wait_for("inspect-config falcon-rw-1b ")
        terminal.type("--js\t")
        terminal.wait_for("--json ")


def test_nothing_heavy_is_imported() -> None:
    script = "import sys; from tinyserve import cli; cli.run([]); print(*sys.modules)"
    line = {"COMP_WORDS": "tinyserve\nask\nsmol", "COMP_CWORD": "2", "_TINYSERVE_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [*PROGRAM[:1], "-c", script], check=True, capture_output=True, text=True, env=environment(**line)
    )
    assert "smollm2-135m\n" in done.stdout
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"numpy", "numba", "tokenizers", "huggingface_hub", "jinja2", "gguf", "httpx2", "rich.console"}
