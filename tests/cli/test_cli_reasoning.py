"""What a model thinks is shown on a terminal, dimmed, and is no part of what a pipe or a file gets."""

import io
import json
import sys
from pathlib import Path

import pytest
from checkpoints import CHAT_TEMPLATE, CONFIGS, write_folder
from command_line import Shell
from servers import running

from tinyserve.cli._answer_printer import AnswerPrinter
from tinyserve.cli._backends import Piece
from tinyserve.progress import LoadProgress

TEMPLATE = CHAT_TEMPLATE + "{% if enable_thinking is not false %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
PIECES = [Piece("", "Let me"), Piece("", " see."), Piece("Yes"), Piece(".")]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(monkeypatch: pytest.MonkeyPatch, is_terminal: bool, *pieces: Piece, **options: bool) -> tuple[str, str]:
    out, error = io.StringIO(), Terminal() if is_terminal else io.StringIO()
    line = LoadProgress("m")
    monkeypatch.setattr(line, "clear", lambda: None)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", error)
    printer = AnswerPrinter(line, **options)
    for piece in pieces:
        printer.write(piece)
    printer.clear()
    monkeypatch.undo()
    assert (printer.text, printer.reasoning) == ("".join(p.text for p in pieces), "".join(p.reasoning for p in pieces))
    return out.getvalue(), error.getvalue()


def test_thinking_is_dimmed_and_not_on_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, True, *PIECES) == ("Yes.", "\x1b[2mLet me see.\x1b[22m\n\n")
    assert printed(monkeypatch, False, *PIECES) == ("Yes.", ""), "whoever keeps what is said does not want it"
    assert printed(monkeypatch, True, *PIECES[:2]) == ("", "\x1b[2mLet me see.\x1b[22m\n\n"), "cut off while it thinks"
    assert printed(monkeypatch, True, *PIECES[2:]) == ("Yes.", "")
    assert printed(monkeypatch, True, *PIECES, is_silent=True) == ("", "")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("m"), CONFIGS["llama"] | {"max_position_embeddings": 512})
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
    return folder


def test_ask_tells_thinking_from_the_answer(thinker: Path, shell: Shell) -> None:
    said = ["Why?", "--regex", "Yes", "--thinking-token-budget", "5", "--temperature", "0", "--json"]
    local = json.loads(shell("ask", thinker, *said).out)
    assert local["text"] == "Yes" and local["reasoning"]
    silent = json.loads(shell("ask", thinker, *said, "--reasoning-effort", "none").out)
    assert silent["text"] == "Yes" and "reasoning" not in silent
    with running({"tiny": thinker}, num_threads=1, max_num_seqs=2) as server:
        remote = json.loads(shell("ask", *said, "--server", server.url).out)
        assert (remote["text"], remote["reasoning"]) == ("Yes", local["reasoning"])
        quiet = json.loads(shell("ask", *said, "--server", server.url, "--reasoning-effort", "none").out)
        assert quiet["text"] == "Yes" and "reasoning" not in quiet


def test_chat_keeps_the_answer_alone(thinker: Path, shell: Shell) -> None:
    result = shell("chat", thinker, "--thinking-token-budget", "3", "--max-tokens", "20", stdin="Why?\nAnd?\n")
    assert result.code == 0 and "</think>" not in result.out and "<think>" not in result.out


def test_how_much_is_thought_needs_a_template(thinker: Path, shell: Shell) -> None:
    result = shell("ask", thinker, "Why?", "--raw", "--reasoning-effort", "low")
    assert result.code == 2 and "--reasoning-effort needs a chat template" in result.err and not result.out
