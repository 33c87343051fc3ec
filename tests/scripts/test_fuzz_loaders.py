"""The fuzzer of the loaders finds nothing in some hundred damaged checkpoints, and would say so if it did."""

import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from scripts import SCRIPTS, load_script
from tinyserve.errors import CheckpointError

SCRIPT = SCRIPTS / "fuzz" / "loaders.py"


@pytest.fixture(scope="module")
def fuzzer() -> Any:
    return load_script("fuzz/loaders.py")


def test_every_damaged_checkpoint_is_a_model_or_a_sentence() -> None:
    command = [sys.executable, str(SCRIPT), "--count", "150", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert re.search(r"^150 cases, 0 of them", done.stdout, re.MULTILINE)


def test_what_is_no_sentence_is_told(fuzzer: Any, tmp_path: Path) -> None:
    class PanicException(BaseException):
        pass

    def raising(error: BaseException) -> str:
        def run(_: Path) -> NoReturn:
            raise error

        return str(fuzzer.fault(tmp_path, run)[0])

    assert raising(CheckpointError("x.json is damaged.")) == ""
    assert raising(TypeError("x")) == "TypeError: x"
    assert raising(PanicException("range")) == "PanicException: range"
    assert raising(CheckpointError("one\ntwo.")).startswith("no sentence")
    assert raising(CheckpointError("x" * 9999 + ".")).startswith("no sentence")
    assert fuzzer.fault(tmp_path, lambda path: None) == ("", "")


def test_a_case_is_made_again_by_its_number(fuzzer: Any, tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        cases = fuzzer.Cases(tmp_path / name, seed=3)
        files = []
        for number in range(12):
            path, what = cases.make(number)
            found = [path] if path.is_file() else sorted(path.iterdir())
            files.append((what, [(file.name, file.read_bytes()) for file in found if file.suffix != ".safetensors"]))
        made.append(files)
    assert made[0] == made[1]


def test_a_change_leaves_the_original_alone(fuzzer: Any) -> None:
    value = {"a": [1, {"b": 2}], "c": "x"}
    outcomes = {repr(fuzzer.changed(value, random.Random(seed))) for seed in range(50)}
    assert value == {"a": [1, {"b": 2}], "c": "x"} and len(outcomes) > 25
