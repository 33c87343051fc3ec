"""On Windows and on macOS, as far as Linux can play them: everything is imported, answers, and ends.

Played is what Python and the file system lack there (tests/support/other_system.py), not what C libraries do.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import other_system
import pytest

from tinyserve import LLM, SamplingParams

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is open")

SYSTEMS = ("win32", "darwin")
OPTIONS = ("--dtype", "float32", "--threads", "2")
PROGRAM = """
import importlib, pkgutil, sys
import tinyserve
for module in pkgutil.walk_packages(tinyserve.__path__, "tinyserve."):
    importlib.import_module(module.name)
from tinyserve import LLM, SamplingParams
from tinyserve.models import cache_plan
from tinyserve.tensor import cgroups
assert cgroups.sys.platform != sys.platform
print(cgroups.available_memory())
llm = LLM(sys.argv[1], dtype="float32", max_num_seqs=6, num_threads=2)
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
print([output.outputs[0].token_ids for output in llm.generate([[1, 2, 3], [9, 8, 7] * 7], params)])
"""


@pytest.fixture(scope="module")
def folder(folder_of: Callable[[str], Path], llm_of: Callable[..., LLM]) -> Path:
    """A model whose kernels are compiled here, and kept, before others look for them."""
    llm_of("llama", "float32")
    return folder_of("llama")


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def run(system: str, tmp_path: Path, *command: str | Path, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    (tmp_path / "site").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *map(str, command)], input=stdin, capture_output=True, text=True, timeout=600, check=False,
        cwd=tmp_path, env=other_system.environment(system, tmp_path / "site", HF_HUB_OFFLINE="1", COLUMNS="80"),
    )  # fmt: skip


def test_all_is_imported_and_a_model_gives_the_same_tokens(
    system: str, tmp_path: Path, folder: Path, llm_of: Callable[..., LLM]
) -> None:
    done = run(system, tmp_path, "-c", PROGRAM, folder)
    assert done.returncode == 0, done.stderr
    free, tokens = done.stdout.splitlines()
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    assert int(free) == (other_system.FREE if system == "win32" else half)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    expected = llm_of("llama", "float32").generate([[1, 2, 3], [9, 8, 7] * 7], params)
    assert json.loads(tokens) == [output.outputs[0].token_ids for output in expected]


def test_the_command_line_answers(system: str, tmp_path: Path, folder: Path) -> None:
    done = run(system, tmp_path, "-m", "tinyserve", "ask", folder, "--max-tokens", "4", *OPTIONS, stdin="Hi")
    assert done.returncode == 0 and done.stdout.strip() and "4 tokens" in done.stderr, done.stderr
    refused = run(system, tmp_path, "-m", "tinyserve", "ask", folder, "Hi", "--dtype", "float99")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    packed = run(system, tmp_path, "-m", "tinyserve", "quantize", folder, "packed", "--dtype", "int8")
    assert packed.returncode == 0, packed.stderr
    assert (tmp_path / "packed/model.safetensors").is_file() and not list(tmp_path.glob("*.partial"))


def test_a_batch_is_answered_and_leaves_nothing_but_its_output(system: str, tmp_path: Path, folder: Path) -> None:
    rows = "".join(f'{{"prompt": "{i}"}}\n' for i in range(3))
    (tmp_path / "in.jsonl").write_text(rows)
    for output, left in (("out.jsonl", None), ("out", ["_SUCCESS", "_fingerprint", "_job.json", "part-00000.jsonl"])):
        command = ["-m", "tinyserve", "batch", "in.jsonl", output, "--model", folder, "--max-tokens", "3", *OPTIONS]
        done = run(system, tmp_path, *command)
        assert done.returncode == 0, done.stderr
        answers = tmp_path / output if left is None else tmp_path / output / left[-1]
        assert answers.read_text().count('"answer"') == 3
        assert left is None or sorted(path.name for path in answers.parent.iterdir()) == left
    assert run(system, tmp_path, *command).returncode == 0  # all is there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out", "out.jsonl", "site"]


@contextmanager
def serving(system: str, tmp_path: Path, *arguments: str | Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    (tmp_path / "site").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyserve", "serve", *map(str, arguments), *OPTIONS, "--port", "0"],
        env=other_system.environment(system, tmp_path / "site", HF_HUB_OFFLINE="1"), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = list[str]()
    try:
        while (found := re.search(r"http://\S+", "".join(said))) is None:
            said.append(process.stderr.readline())
            assert said[-1], "".join(said)
        yield process, found.group()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("system", "number", "code"),
    [
        ("win32", signal.SIGINT, 128 + signal.SIGINT),
        ("win32", other_system.BREAK, 0),
        ("darwin", signal.SIGTERM, 0),
    ],
)
def test_a_server_answers_and_ends(
    system: str, number: signal.Signals, code: int, tmp_path: Path, folder: Path
) -> None:
    """Also where a template and a schema are run in processes that have no limits there, which is said."""
    body = {
        "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 40, "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [17]}}},
    }  # fmt: skip
    with serving(system, tmp_path, folder) as (process, url):
        with httpx.Client(base_url=url, timeout=300, trust_env=False) as client:
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert json.loads(answer.json()["choices"][0]["message"]["content"]) == 17
            assert client.get("/health").status_code == 200
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        assert "Traceback" not in errors and "Finishing what runs" in errors
        for task in ("renders chat templates", "compiles grammars"):
            assert errors.count(f"limits no memory: the process that {task} may take all of it") == 1
