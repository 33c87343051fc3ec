"""`eval`: its table and its JSON beside evaluation/perplexity.py's own numbers, what it refuses, and how it ends."""

import hashlib
import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from command_line import Shell, Terminal

from tinyserve import LLM, loading
from tinyserve.evaluation.perplexity import compare, cross_entropy, perplexity, perplexity_of

FolderOf = Callable[[str], Path]
WORDS = "The cat — théâtre, 猫 — sat there.\n" * 5  # 195 tokens, one a byte but for "th" and "the"
RECIPE = [
    "tinyserve", "processor", "threads", "model", "weights", "text", "text_sha256", "text_bytes", "tokens", "window",
    "against", "results",
]  # fmt: skip


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_bytes(WORDS.encode())
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose kernels are compiled in every dtype, so that nothing is said about that."""
    folder = checkpoints.write_folder(tmp_path_factory.mktemp("eval") / "tiny", checkpoints.CONFIGS["llama"])
    for dtype in ("float32", "bfloat16", "int8"):
        LLM(folder, dtype=dtype).logits("Hi")
    return folder


def report(shell: Shell, *arguments: str | Path) -> dict[str, Any]:
    result = shell("eval", *arguments, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.out.count("\n") == 1
    found: dict[str, Any] = json.loads(result.out)
    return found


# --- what is printed --------------------------------------------------------------------------------------------------


def test_json_is_what_evaluate_finds(shell: Shell, model: Path, text: Path) -> None:
    got = report(shell, model, "--text", text, "--window", "50", "--dtype", "bfloat16", "--dtype", "int8")
    assert list(got) == RECIPE
    assert (got["model"], got["weights"], got["text"], got["window"]) == (str(model), "tiny", "words.txt", 50)
    assert got["text_sha256"] == hashlib.sha256(WORDS.encode()).hexdigest()
    reference = LLM(model, dtype="float32")
    assert reference.tokenizer is not None
    ids = reference.tokenizer.encode(WORDS)
    assert (got["tokens"], got["text_bytes"]) == (len(ids) - 1, len(WORDS.encode()) - len("T"))
    first, *rows = got["results"]
    assert first == {
        "dtype": "float32",
        "perplexity": compare(reference, reference, ids, 50).perplexity,
        "bits_per_byte": first["bits_per_byte"],
        "perplexity_change": None,
        "kl": None,
        "top1": None,
    }
    assert [row["dtype"] for row in rows] == ["bfloat16", "w8a16"]
    for row in rows:
        expected = compare(reference, LLM(model, dtype=row["dtype"]), ids, 50)
        for name in ("perplexity", "perplexity_change", "kl", "top1"):
            assert row[name] == getattr(expected, name)
        assert row["kl"] > 0


def test_bits_per_byte_are_all_the_bits_over_all_the_bytes(shell: Shell, model: Path, text: Path) -> None:
    """The first token is given; everything after it costs bits, and stands for bytes."""
    llm = LLM(model, dtype="float32")
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(WORDS)[:100]
    bits = cross_entropy(llm.logits(ids)[:-1], ids[1:]) * 99 / np.log(2)
    num_bytes = sum(map(len, map(llm.tokenizer.token_bytes, ids[1:])))
    assert 99 < num_bytes < 120
    (row,) = report(shell, model, "--text", text, "--tokens", "100", "--dtype", "float32")["results"]
    assert row["bits_per_byte"] == pytest.approx(bits / num_bytes, rel=1e-12)
    assert row["perplexity"] == pytest.approx(perplexity(llm.logits(ids), ids), rel=1e-12)


def test_special_tokens_have_no_bytes(shell: Shell, model: Path, tmp_path: Path) -> None:
    (tmp_path / "turns.txt").write_text("Hi<|eos|><|user|>Ho")
    got = report(shell, model, "--text", tmp_path / "turns.txt", "--against", "none")
    assert (got["tokens"], got["text_bytes"]) == (5, len("iHo"))


def test_the_table(shell: Shell, model: Path, text: Path) -> None:
    """The same numbers, rounded, a line for each dtype; the default is int8 against float32, in the whole context."""
    result = shell("eval", model, "--text", text)
    assert (result.code, result.err) == (0, "")
    got = report(shell, model, "--text", text)
    title, heading, first, second = result.out.splitlines()
    assert title == (
        f"{model} (tiny) on words.txt (sha256 {got['text_sha256'][:16]}): {got['tokens']} tokens predicted in windows "
        f"of 128"
    )
    assert re.split(r"\s{2,}", heading) == [
        "dtype", "perplexity", "bits/byte", "change", "KL, nats", "top-1 equal", "against float32",
    ]  # fmt: skip
    reference, row = got["results"]
    assert first.split() == ["float32", f"{reference['perplexity']:.3f}", f"{reference['bits_per_byte']:.4f}"]
    assert second.split() == [
        "w8a16", f"{row['perplexity']:.3f}", f"{row['bits_per_byte']:.4f}", f"{row['perplexity_change'] * 100:+.2f}",
        "%", f"{row['kl']:.5f}", f"{row['top1'] * 100:.2f}", "%",
    ]  # fmt: skip


def test_against_none_leaves_the_comparison_out(shell: Shell, model: Path, text: Path) -> None:
    options = ("--text", text, "--dtype", "int8", "--dtype", "float32", "--against", "none")
    got = report(shell, model, *options)
    assert got["against"] is None
    assert [row["dtype"] for row in got["results"]] == ["w8a16", "float32"]
    for row in got["results"]:
        llm = LLM(model, dtype=row["dtype"])
        assert llm.tokenizer is not None
        assert row["perplexity"] == perplexity_of(llm, llm.tokenizer.encode(WORDS))
        assert row["perplexity_change"] is row["kl"] is row["top1"] is None
    _, heading, *lines = shell("eval", model, *options).out.splitlines()
    assert heading.split() == ["dtype", "perplexity", "bits/byte"]
    assert [len(line.split()) for line in lines] == [3, 3]


def test_another_reference_and_dtypes_said_twice(shell: Shell, model: Path, text: Path) -> None:
    """A dtype has one row, whatever it is called, and is not compared with itself."""
    dtypes = ("--dtype", "w8a16", "--dtype", "float32", "--dtype", "int8", "--dtype", "bf16")
    got = report(shell, model, "--text", text, *dtypes, "--against", "bfloat16")
    assert got["against"] == "bfloat16"
    assert [(row["dtype"], row["kl"] is None) for row in got["results"]] == [
        ("bfloat16", True), ("w8a16", False), ("float32", False),
    ]  # fmt: skip
    alone = report(shell, model, "--text", text, "--dtype", "float32")
    assert [(row["dtype"], row["kl"]) for row in alone["results"]] == [("float32", None)]
    assert alone["results"][0]["perplexity"] == pytest.approx(got["results"][2]["perplexity"], rel=1e-12)


@pytest.mark.parametrize(("window", "tokens", "expected"), [(1, 20, 1), (7, 50, 7), (5000, 195, 128)])
def test_windows_and_tokens(shell: Shell, model: Path, text: Path, window: int, tokens: int, expected: int) -> None:
    """A window is no longer than the model's context, and may be a single token."""
    got = report(shell, model, "--text", text, "--window", str(window), "--tokens", str(tokens), "--against", "none")
    assert (got["window"], got["tokens"]) == (expected, tokens - 1)
    llm = LLM(model)
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(WORDS)[:tokens]
    assert len(ids) == tokens
    assert got["results"][0]["perplexity"] == perplexity_of(llm, ids, expected)


def test_two_models_are_in_memory_at_a_time(
    shell: Shell, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[LLM]] = []
    counts = []

    class Counted(LLM):
        def __init__(self, *arguments: Any, **options: Any):
            alive.append(weakref.ref(self))
            counts.append((options["dtype"], sum(one() is not None for one in alive)))
            super().__init__(*arguments, **options)

    monkeypatch.setattr("tinyserve.llm.LLM", Counted)
    report(shell, model, "--text", text, "--dtype", "int8", "--dtype", "bfloat16", "--threads", "1")
    assert counts == [("float32", 1), ("w8a16", 2), ("bfloat16", 2)]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"words.txt cannot be read \(No such file or directory\): give --text a file of UTF-8 text"),
        (b"caf\xe9", r"words.txt is not UTF-8 text \(at byte 3\): convert it first"),
        (b"", r"words.txt is empty"),
        (b" \n", r"words.txt is empty"),
        (b"a", r"The text comes to 1 token of .*tiny, and the first is not predicted: give a text with 2 or more"),
        (b"<|bos|><|eos|>", r"The text comes to 2 tokens of .*give a text with 2 or more that are not special"),
    ],
)
def test_a_text_that_cannot_be_evaluated(
    shell: Shell, model: Path, tmp_path: Path, content: bytes | None, says: str
) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    result = shell("eval", model, "--text", path)
    assert result.code == 2
    assert re.search(says, result.sentence), result.sentence


def test_an_unknown_model(shell: Shell, text: Path) -> None:
    result = shell("eval", "smolm2-135m", "--text", text)
    assert result.code == 2
    assert "Did you mean smollm2-135m" in result.sentence


def test_a_folder_is_no_text_and_some_text_is_needed(shell: Shell, model: Path, tmp_path: Path) -> None:
    folder, nothing = shell("eval", model, "--text", tmp_path), shell("eval", model)
    assert (folder.code, nothing.code) == (2, 2)
    assert f"{tmp_path} cannot be read (Is a directory)" in folder.sentence
    assert "give a file in UTF-8 with --text FILE" in nothing.sentence


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--window 0", r"'--window'.*1.*; see tinyserve eval --help"),
        ("--window few", r"'--window'.*int.*; see tinyserve eval --help"),
        ("--tokens 1", r"'--tokens'.*2.*; see tinyserve eval --help"),
        ("--threads 0", r"--threads is 0; it must be at least 1"),
        ("--dtype int9", r"dtype 'int9' is not built; there are float32, .*Did you mean 'int8'"),
        ("--dtype int8 --dtype int9", r"dtype 'int9' is not built"),
        ("--against nothing", r"dtype 'nothing' is not built; there are float32, "),
        ("--frob", r"No such option.*; see tinyserve eval --help"),
    ],
)
def test_options_that_cannot_be(shell: Shell, model: Path, text: Path, options: str, says: str) -> None:
    result = shell("eval", model, "--text", text, *options.split())
    assert result.code == 2
    assert re.search(says, result.sentence, re.IGNORECASE), result.sentence


def test_what_is_wrong_is_said_before_a_model_is_loaded(
    shell: Shell, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tinyserve.llm.LLM", no_model)
    assert "'int9' is not built" in shell("eval", model, "--text", text, "--dtype", "int9").sentence
    (tmp_path / "short.txt").write_text("a")
    assert "1 token of" in shell("eval", model, "--text", tmp_path / "short.txt").sentence
    monkeypatch.setattr("tinyserve.loading.open_model", no_model)
    assert "cannot be read" in shell("eval", model, "--text", tmp_path / "missing").sentence


def test_a_model_without_a_tokenizer(
    shell: Shell, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Synthetic weights speak token ids only, and a checkpoint's folder may lack tokenizer.json."""
    files = loading.open_model(model, "dummy")
    monkeypatch.setattr("tinyserve.loading.open_model", lambda _: files)
    synthetic = shell("eval", model, "--text", text)
    monkeypatch.undo()
    folder = checkpoints.write_folder(tmp_path / "model", checkpoints.CONFIGS["llama"])
    (folder / "tokenizer.json").unlink()
    lacking = shell("eval", folder, "--text", text)
    assert (synthetic.code, lacking.code) == (2, 2)
    assert "no tokenizer: there is no text it could read" in synthetic.sentence
    assert "tokenizer.json" in lacking.sentence


def test_a_tokenizer_that_knows_more_tokens_than_the_model(shell: Shell, text: Path, tmp_path: Path) -> None:
    raw = checkpoints.CONFIGS["llama"] | {"vocab_size": 200, "bos_token_id": None, "eos_token_id": None}
    folder = checkpoints.write_folder(tmp_path / "model", raw)
    result = shell("eval", folder, "--text", text)
    assert result.code == 2
    assert re.search(r"Token id 257 is outside .*'s vocabulary of 200", result.sentence)


# --- in a terminal ----------------------------------------------------------------------------------------------------


def test_a_bar_shows_the_tokens_and_the_time_left(model: Path, text: Path) -> None:
    with Terminal("eval", model, "--text", text, "--window", "50", columns=200) as terminal:
        terminal.wait_for("0/194")
        shown = terminal.wait_for("dtype ")
        assert re.search(r"w8a16 \|.* \d+/194, 0:00:0\d left", shown)
        assert terminal.end() == 0
        assert terminal.shown.splitlines()[-1].startswith("w8a16 ")


def test_ctrl_c_ends_quietly(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(WORDS * 1000)
    with Terminal("eval", model, "--text", path, "--window", "1") as terminal:
        terminal.wait_for(" left")  # in the middle of the text
        terminal.type("\x03")
        assert terminal.end() == 130
        assert "Traceback" not in terminal.shown
        assert "Error" not in terminal.shown
        assert "perplexity" not in terminal.shown
