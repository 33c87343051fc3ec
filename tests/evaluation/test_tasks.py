"""The tasks' questions, how answers are marked and counted, and what a real model makes of them."""

import re
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from scripts import SCRIPTS, load_script
from tinyserve import LLM
from tinyserve.errors import UserError
from tinyserve.evaluation.likelihood import Likelihood
from tinyserve.evaluation.tasks import TASKS, Score, find, run, score

SCRIPT = SCRIPTS / "make_tasks.py"
NUMBERS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30,
}  # fmt: skip


# --- the questions ----------------------------------------------------------------------------------------------------


def test_the_files_are_what_the_script_writes(tmp_path, monkeypatch, capsys):
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    module = load_script("make_tasks.py")
    (tmp_path / "harness").mkdir()
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_tasks.py", "--check"])
    assert module.main() == 1
    assert capsys.readouterr().err.count("is stale") == 5
    assert not list((tmp_path / "harness").iterdir())
    monkeypatch.setattr(sys, "argv", ["make_tasks.py"])
    assert module.main() == 0
    assert (tmp_path / "arithmetic.jsonl").read_bytes() == TASKS["arithmetic"].content


@pytest.mark.parametrize("name", TASKS)
def test_every_question_is_asked_once(name):
    items = TASKS[name].items()
    assert 40 <= len(items) <= 100
    assert len({item["prompt"] for item in items}) == len(items)
    assert TASKS[name].items(7) == items[:7]
    assert all(item["prompt"] == item["prompt"].strip() for item in items)


@pytest.mark.parametrize("name", ["cloze", "facts"])
def test_choices_are_four_and_the_right_one_is_anywhere(name):
    items = TASKS[name].items()
    assert all(len(set(item["choices"])) == 4 for item in items)
    places = np.bincount([item["answer"] for item in items])
    assert len(places) == 4 and places.min() >= len(items) / 8


def test_the_arithmetic_is_right():
    def value(words):
        return int(words) if words.isdigit() else sum(NUMBERS[word] for word in words.split("-"))

    for item in TASKS["arithmetic"].items():
        a, sign, b = re.fullmatch(r"(\S+) (\+|-|plus|minus) (\S+) (?:=|is)", item["prompt"]).groups()
        assert value(item["answer"]) == value(a) + (value(b) if sign in ("+", "plus") else -value(b))
        assert item["answer"].isdigit() == a.isdigit()


# --- marking ----------------------------------------------------------------------------------------------------------


def test_multiple_choice_takes_the_likeliest_and_the_likeliest_by_length(monkeypatch):
    """One long choice that is unlikely by its sum, and the best by its mean; a tie is the first's."""
    items = [
        {"prompt": "A", "choices": ["ab", "a long one"], "answer": 1},
        {"prompt": "B", "choices": ["ab", "cd"], "answer": 1},
        {"prompt": "C", "choices": ["ab", "cd"], "answer": 0},
    ]
    asked = []

    def scripted(llm, pairs, progress):
        asked.extend(pairs)
        return [Likelihood(number, False) for number in (-4, -5, -3, -2, -1, -1)]

    monkeypatch.setattr("tinyserve.evaluation.tasks.encode_pair", lambda llm, *texts: texts)
    monkeypatch.setattr("tinyserve.evaluation.tasks.loglikelihoods", scripted)
    assert TASKS["cloze"].outcomes(None, items) == {"acc": [False, True, True], "acc_norm": [True, True, True]}
    assert asked[:3] == [("A", " ab"), ("A", " a long one"), ("B", " ab")]


def test_exact_match_reads_one_batch_and_ignores_spaces_around(monkeypatch):
    asked = []

    def generate(prompts, params):
        asked.append((prompts, params))
        return [SimpleNamespace(outputs=[SimpleNamespace(text=text)]) for text in (" 61", "61 ", "62", "", "six")]

    monkeypatch.setattr("tinyserve.evaluation.tasks.encode", lambda llm, text: text)
    items = [{"prompt": f"{i} + 2 =", "answer": "61"} for i in range(5)]
    task = TASKS["arithmetic"]
    assert task.outcomes(SimpleNamespace(generate=generate), items) == {
        "exact_match": [True, True, False, False, False]
    }
    ((prompts, params),) = asked
    assert prompts[3] == f"{task.examples}3 + 2 ="
    assert (params.temperature, params.stop, params.max_tokens) == (0, ("\n", "."), 16)


def test_a_score_is_a_mean_with_its_standard_error():
    right = [True] * 7 + [False] * 4
    got = score("w8a16", "cloze", "acc", right)
    assert got == Score(
        "w8a16", "cloze", "acc", 11, pytest.approx(7 / 11), pytest.approx(np.std(right, ddof=1) / np.sqrt(11))
    )
    assert score("w8a16", "cloze", "acc", [True, True]).stderr == 0


# --- runs -------------------------------------------------------------------------------------------------------------


class Task:
    name = "questions"

    def items(self, limit):
        return list(range(limit or 9))

    def outcomes(self, llm, items, progress):
        progress("evaluate", len(items), 9)
        return {"acc": [item % 2 == llm.parity for item in items]}


def test_a_run_has_one_model_in_memory_and_says_what_it_does():
    alive, heard = [], []

    class Model(SimpleNamespace):
        pass

    def load(dtype):
        assert all(model() is None for model in alive)
        model = Model(name=dtype, tokenizer="", parity=len(alive))
        model.itself = model  # a cycle, which only the collector takes apart
        alive.append(weakref.ref(model))
        return model

    scores = list(run(load, [Task()], ["int8", "float32", "int8"], None, lambda *said: heard.append(said)))
    assert [(one.dtype, one.task, one.metric, one.n, one.value) for one in scores] == [
        ("int8", "questions", "acc", 9, 5 / 9),
        ("float32", "questions", "acc", 9, 4 / 9),
    ]
    assert heard == [("int8 questions", 9, 9), ("float32 questions", 9, 9)]
    assert [one.n for one in run(lambda _: Model(tokenizer="", parity=0), [Task()], ["int8"], 4)] == [4]


def test_what_cannot_be_run_is_refused():
    with pytest.raises(
        UserError, match=r"no task 'cloz'\. Did you mean 'cloze'\? The tasks are arithmetic, cloze, facts"
    ):
        find(["facts", "cloz"])
    assert [task.name for task in find(["facts", "cloze", "facts"])] == ["facts", "cloze"]
    with pytest.raises(UserError, match="The limit is 1; a standard error takes at least 2"):
        list(run(lambda _: None, [Task()], ["int8"], 1))
    with pytest.raises(UserError, match="x has synthetic weights and no tokenizer"):
        list(run(lambda _: SimpleNamespace(name="x", tokenizer=None), [Task()], ["int8"]))


def test_a_real_model_is_better_than_chance(smollm2):
    """Of four choices; what it gets is in docs/evaluation.md."""
    llm = LLM(smollm2, max_model_len=256)
    scores = {(one.task, one.metric): one for one in run(lambda _: llm, list(TASKS.values()), ["int8"], 32)}
    assert len(scores) == 5
    for task in ("cloze", "facts"):
        assert scores[task, "acc"].value > 0.6, scores
    assert scores["arithmetic", "exact_match"].value > 0.1, scores
