"""What the documentation shows is run, and what it points at exists."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import checkpoints
import pytest
from servers import running
from tool_templates import GRANITE_4

from tinyserve.batch.service import BatchService

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block_after(marker: str) -> str:
    """The fenced block that follows an HTML comment."""
    match = re.search(rf"<!-- {marker} -->\n```bash\n(.*?)\n```", README, re.DOTALL)
    assert match is not None
    return match[1]


def run(arguments: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, **options)


def test_the_question_in_the_readme_is_answered(smollm2: Path) -> None:
    """The last part of the first command, in this environment; .ci/run runs the second one whole."""
    *_, ask = block_after("ask").split(" && ")
    arguments = shlex.split(ask)
    assert arguments[0] == ".venv/bin/tinyserve"
    done = run([sys.executable, "-m", "tinyserve", *arguments[1:]])
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert re.search(r"prefill \d+ tokens at \d+/s", done.stderr)


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert block_after("test").endswith("&& .venv/bin/python -m pytest -n 2 --dist loadfile")
    assert "<!-- test -->" in (ROOT / ".ci" / "run").read_text()


def test_the_python_example_runs(smollm2: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = run([sys.executable, "-c", example + "\nprint(logits.shape, logits.dtype)"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is Paris.")
    assert done.stdout.endswith("(4, 49152) float32\n")


def test_the_page_about_python_runs(smollm2: Path) -> None:
    """All its examples, one after the other, as a reader would."""
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) >= 5
    done = run([sys.executable, "-c", "\n".join(examples)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Paris") >= 3 and "Tokyo" in done.stdout and "EngineStats(num_running=0" in done.stdout


def test_the_page_about_kernels_runs(tmp_path: Path) -> None:
    """Its example is a file: Numba reads a kernel's source."""
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    done = run([sys.executable, str(tmp_path / "example.py")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["3.0", "2 10.0", "2 20.0"]


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny hybrid in Granite's place, whose template shows tools."""
    raw = checkpoints.CONFIGS["granite-hybrid"] | {"max_position_embeddings": 2048}
    folder = checkpoints.write_folder(tmp_path_factory.mktemp("tools") / "model", raw)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": GRANITE_4}))
    return folder


def test_the_page_about_serving_runs(smollm2: Path, with_tools: Path) -> None:
    """Its Python, one example after the other, and its first question in a shell, against a server."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    examples = re.findall(r"(?<!not run by the tests -->\n)```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) >= 7
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with running({"smollm2-135m": smollm2, "granite-350m": with_tools}, max_num_seqs=4) as server:
        here = "\n".join(examples).replace("http://127.0.0.1:8000", server.url)
        done = run([sys.executable, "-c", here], env={**os.environ, "PATH": path})
        (ask,) = re.findall(r"^tinyserve (ask --server .*)$", page, re.MULTILINE)
        arguments = shlex.split(ask.replace("http://127.0.0.1:8000", server.url))
        asked = run([sys.executable, "-m", "tinyserve", *arguments, "--temp", "0"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Paris") >= 3 and "Tokyo" in done.stdout
    assert re.search(r"^city='.*' country='.*'$", done.stdout, re.MULTILINE)
    assert re.search(r"^(yes|no)$", done.stdout, re.MULTILINE)
    assert re.search(r'^weather \{"city": ?"(Paris|Oslo)"\}$', done.stdout, re.MULTILINE)
    assert asked.returncode == 0 and "Paris" in asked.stdout, asked.stderr
    rows = dict(re.findall(r"^(\d+) (\d+ \d+)$", done.stdout, re.MULTILINE))
    table = dict(re.findall(r"\| sequences of ([\d,]+) tokens in a cache of 4 GB \| (\d+ \| \d+) \|", page))
    assert rows == {tokens.replace(",", ""): counts.replace(" |", "") for tokens, counts in table.items()}


def test_the_page_about_many_prompts_runs(smollm2: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8").partition("\n## More than one engine")[0]
    shell = "\n".join(re.findall(r"<!-- run by the tests -->\n```bash\n(.*?)```", page, re.DOTALL))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = run(["bash", "-ec", shell], cwd=tmp_path, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["id"] for row in answers] == [1, 2]
    assert "Paris" in answers[0]["answer"] and "Tokyo" in answers[1]["answer"]
    over_http, example = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = run([sys.executable, "-c", example], cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("2 0 "), done.stderr
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "answers.jsonl").read_text()
    service = BatchService(tmp_path / "batches", 2)
    with running({"smollm2-135m": smollm2}, app={"extension": service}, max_num_seqs=4) as server:
        done = run([sys.executable, "-c", over_http.replace("http://127.0.0.1:8000", server.url)])
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr


def test_the_section_about_slices_runs(smollm2: Path) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Slices.*?(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    (inspect,) = re.findall(r"^tinyserve (inspect-config [^#\n]*)", section, re.MULTILINE)
    told = run([sys.executable, "-m", "tinyserve", *shlex.split(inspect)])
    assert told.returncode == 0 and "16.4 kB cross the network for each token" in told.stdout, told.stderr
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    done = run([sys.executable, "-c", example])
    assert done.returncode == 0 and "Paris" in done.stdout, done.stderr


def test_every_command_in_the_readme_exists() -> None:
    import typer

    from tinyserve.cli import app

    commands = typer.main.get_command(app).commands
    shown = re.findall(r"^tinyserve ([a-z-]+)", README, re.MULTILINE)
    assert len(shown) >= 8
    assert set(shown) <= set(commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target.replace("\\_", "_")).exists(), target


def test_no_page_names_this_machine() -> None:
    for page in PAGES:
        assert not re.search(r"/work/|/root/|/tmp/", page.read_text(encoding="utf-8")), page
