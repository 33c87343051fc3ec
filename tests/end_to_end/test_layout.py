"""The package is laid out as it is told: few entries, layers of the docs, files to read first, mirrored tests."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tinyserve"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
INDEX = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
ENTRIES = {
    path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
}
SECOND_FILES = {"engine_thread", "kernel_cache", "structured_outputs"}  # of tests of one module


def test_a_newcomer_can_take_in_the_package_at_a_glance() -> None:
    assert len(ENTRIES) <= 26
    assert {"llm", "engine", "model_runner", "tensor", "cli"} <= ENTRIES
    assert (PACKAGE / "py.typed").is_file()


def test_the_figure_of_the_docs_has_the_layers_of_the_contract() -> None:
    contract = next(one for one in PROJECT["tool"]["importlinter"]["contracts"] if one["type"] == "layers")
    layers = [set(re.findall(r"\w+", layer)) for layer in contract["layers"]]
    figure = re.search(r"```text\n(.*?)```", INDEX, re.DOTALL)
    assert figure is not None
    # The names stand before the first gap that is wider than the three spaces between two of them.
    drawn = [set(re.findall(r"\w+", re.split(r" {4,}", line.strip())[0])) for line in figure[1].splitlines()]
    assert len(layers) <= 13
    assert drawn == layers
    assert set().union(*layers) == ENTRIES - {"__init__", "__main__"}


def test_the_reading_list_is_current() -> None:
    script = ROOT / "scripts" / "make_reading_list.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\S+)\]\(tinyserve/\1\) \| (\d+) \|", readme, re.MULTILINE)
    assert len(listed) == 13 and listed[0][0] == "llm.py"
    assert all(len((PACKAGE / file).read_text("utf-8").splitlines()) == int(lines) for file, lines in listed)


def test_tests_mirror_the_package() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    packages = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages <= folders
    assert folders - packages == {"scripts", "end_to_end"}
    for file in (ROOT / "tests").glob("test_*.py"):
        assert file.stem.removeprefix("test_") in ENTRIES | SECOND_FILES, file.name
