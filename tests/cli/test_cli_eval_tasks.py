"""`eval --task`: its list, its table and its JSON beside the tasks' own numbers, and what it refuses."""

import json
import re
from pathlib import Path

import checkpoints
import pytest
from command_line import Shell, Terminal

from tinyserve import LLM
from tinyserve.evaluation.tasks import TASKS, run

ALL = ("--task", "arithmetic", "--task", "cloze", "--task", "facts")


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with room for the questions, a token a byte, whose kernels are compiled."""
    raw = checkpoints.CONFIGS["llama"] | {"max_position_embeddings": 256}
    folder = checkpoints.write_folder(tmp_path_factory.mktemp("tasks") / "tiny", raw)
    for dtype in ("float32", "int8"):
        LLM(folder, dtype=dtype).generate("Hi")
    return folder


def test_the_list_needs_no_model(shell: Shell) -> None:
    result = shell("eval", "--task", "list")
    assert (result.code, result.err) == (0, "")
    assert [line.split()[:3] for line in result.out.splitlines()] == [
        ["arithmetic", "80", "questions:"],
        ["cloze", "64", "questions:"],
        ["facts", "64", "questions:"],
    ]


def test_json_is_what_the_tasks_find(shell: Shell, model: Path) -> None:
    result = shell("eval", model, *ALL, "--dtype", "int8", "--dtype", "float32", "--limit", "6", "--json")
    assert (result.code, result.err) == (0, "")
    got = json.loads(result.out)
    assert got["tasks_sha256"] == {name: task.sha256 for name, task in TASKS.items()}
    assert (got["model"], got["weights"]) == (str(model), "tiny")
    expected = run(lambda dtype: LLM(model, dtype=dtype), list(TASKS.values()), ["w8a16", "float32"], 6)
    assert got["results"] == [vars(score) for score in expected]
    assert len(got["results"]) == 10


def test_the_table(shell: Shell, model: Path) -> None:
    options = ("eval", model, "--task", "facts", "--task", "facts", "--limit", "6")
    title, heading, *lines = shell(*options).out.splitlines()
    assert title.startswith(f"{model} (tiny) on the tasks of tinyserve ")
    assert re.split(r"\s{2,}", heading) == ["dtype", "task", "metric", "n", "right", "std. error"]
    found = json.loads(shell(*options, "--json").out)["results"]
    assert [line.split() for line in lines] == [
        ["w8a16", "facts", one["metric"], "6", f"{one['value'] * 100:.1f}", "%", f"{one['stderr'] * 100:.1f}", "%"]
        for one in found
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--task clozes", r"There is no task 'clozes'. Did you mean 'cloze'\? The tasks are arithmetic, cloze, facts"),
        ("--task cloze --text book.txt", r"--text, --tokens, --window and --against are for a text"),
        ("--task cloze --tokens 5", r"give a task or a text, not both"),
        ("--task cloze --against none", r"give a task or a text, not both"),
        ("--task cloze --limit 1", r"'--limit'.*2"),
        ("--task cloze --dtype int9", r"dtype 'int9' is not built"),
        ("--limit 5 --text book.txt", r"--limit is for tasks"),
        ("", r"give a file in UTF-8 with --text FILE, .* or a task \(--task list shows them\)"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    shell: Shell, model: Path, options: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("tinyserve.llm.LLM")
    result = shell("eval", model, *options.split())
    assert result.code == 2
    assert re.search(says, result.sentence), result.sentence


def test_questions_that_do_not_fit(shell: Shell, tmp_path: Path) -> None:
    raw = checkpoints.CONFIGS["llama"] | {"max_position_embeddings": 64}
    result = shell("eval", checkpoints.write_folder(tmp_path / "small", raw), "--task", "arithmetic")
    assert result.code == 2
    assert "64" in result.sentence


def test_a_bar_shows_the_task(model: Path) -> None:
    with Terminal("eval", model, "--task", "cloze", columns=200) as terminal:
        shown = terminal.wait_for("dtype ")
        assert re.search(r"w8a16 cloze .* \d+/\d+, 0:00:\d\d left", shown)
        assert terminal.end() == 0
