"""The examples run, each in a process of its own, and say what they are there to say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from servers import running

EXAMPLES = Path(__file__).parents[2] / "examples"
SAID = {
    "answer": r"The capital of France is Paris\.\n37 tokens read, \d+ written, stop\n",
    "stream": r"(?s).{80,}",
    "many": r"(?s)France: .*Paris.*Japan: .*Tokyo.*Peru: ",
    "structured": r"\{'city': 'Paris', 'country': 'France'\}",
    "surprise": r"(?s)Paris\.\n.*' Paris' +(\d\.\d).*Oslo\.\n.*' Oslo' +(\d+\.\d)",
    "lens": r"(?s)^ embedding .*layer 29 .*' Paris'",
    "server": r"The capital of France is Paris\.",
}


def run(name: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        capture_output=True, text=True, timeout=300, env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_no_others() -> None:
    assert SAID.keys() == {file.stem for file in EXAMPLES.glob("*.py")}
    assert all(len(file.read_text(encoding="utf-8").splitlines()) <= 25 for file in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", sorted(SAID.keys() - {"server"}))
def test_it_says_what_it_should(name: str, smollm2: Path) -> None:
    found = re.search(SAID[name], run(name))
    assert found is not None
    if name == "surprise":
        assert float(found[1]) < 3 < float(found[2])


def test_the_servers_example(smollm2: Path) -> None:
    with running({"smollm2-135m": smollm2}, max_num_seqs=2) as server:
        assert re.search(SAID["server"], run("server", OPENAI_BASE_URL=f"{server.url}/v1"))
