"""`ask-gpt2`, `ask-falcon`, `ask-llama`, `ask-granite`: `tinyserve ask FAMILY` that answers without a network, too."""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from command_line import environment

from tinyserve.checkpoints import hub
from tinyserve.cli import ask
from tinyserve.errors import HubUnreachable

FAMILIES = ["gpt2", "falcon", "llama", "granite"]


def run(program: str, *arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """The program as it is installed."""
    return subprocess.run(
        [Path(sys.executable).parent / program, *arguments],
        input=stdin, capture_output=True, text=True, timeout=300, check=False, env=environment(**variables),
    )  # fmt: skip


def test_there_is_one_for_each_family_of_the_zoo() -> None:
    installed = {point.name for point in entry_points(group="console_scripts") if point.name.startswith("ask-")}
    assert set(ask.PROGRAMS) == installed & set(ask.PROGRAMS) == {f"ask-{family}" for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_network_the_zoo_answers_and_says_so(family: str, tmp_path: Path) -> None:
    cache = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = run(f"ask-{family}", "Once upon a time", "--max-tokens", "8", "--temp", "0", "-q", **cache)
    assert done.returncode == 0
    assert len(done.stdout.split()) >= 4
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"ask-{family}: ") and line.endswith(f"tiny-{family} answers, which comes with tinyserve.")
    same = run("tinyserve", "ask", f"tiny-{family}", "Once upon a time", "--max-tokens", "8", "--temp", "0", "-q")
    assert (same.stdout, same.stderr) == (done.stdout, "")


def test_it_has_the_options_of_ask() -> None:
    done = run("ask-gpt2", "--model", "tiny", "--json", "--max-tokens", "3", stdin="One day")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["model"] == "tiny-gpt2"
    help_ = run("ask-gpt2", "--help").stdout
    assert "Usage: ask-gpt2 [OPTIONS] [PROMPT]" in help_ and "tiny-gpt2 answers" in help_ and "--temperature" in help_
    assert 'ask-gpt2 "The capital of France is"' in help_
    for wrong, words in ((["--bogus"], "see ask-gpt2 --help"), (["--model", "tinyy", "x"], "no variant 'tinyy'")):
        done = run("ask-gpt2", *wrong)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_what_is_on_this_disk_answers_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "resolve", lambda ref, patience: tmp_path)
    assert ask._at_hand("gpt2", "ask-gpt2") == "gpt2"


def test_only_a_hub_out_of_reach_is_stood_in_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(error: Exception) -> None:
        def resolve(ref: object, patience: float) -> Path:
            raise error

        monkeypatch.setattr(hub, "resolve", resolve)

    refuse(HubUnreachable("no route"))
    assert ask._at_hand("gpt2", "ask-gpt2") == "tiny-gpt2"
    assert "gpt2 is not on this disk" in capsys.readouterr().err
    refuse(hub_error := ask.UserError("gated"))
    with pytest.raises(type(hub_error), match="gated"):
        ask._at_hand("gpt2", "ask-gpt2")


def test_tinyserve_itself_does_not_stand_in(tmp_path: Path) -> None:
    done = run("tinyserve", "ask", "gpt2", "Hello", HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    assert done.returncode == 1 and "HF_HUB_OFFLINE forbids the network" in done.stderr
    assert "tiny-gpt2, a tiny one of its family, comes with tinyserve." in done.stderr
