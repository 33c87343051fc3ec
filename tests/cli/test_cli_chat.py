"""`chat`: what is one message, which commands there are, what is kept, and how answers are printed on a terminal."""

import io
import json
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from command_line import Shell, Terminal
from fake_openai import DONE, FakeOpenAI, answer, delta, usage

from tinyserve import LLM, SamplingParams
from tinyserve.cli import _lines
from tinyserve.cli._answer_printer import AnswerPrinter
from tinyserve.cli._backends import Piece
from tinyserve.progress import LoadProgress

PASTED = "\x1b[200~{}\x1b[201~"
UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI([{"id": "first"}]) as fake:
        yield fake


def asked(server: FakeOpenAI) -> list[str]:
    """The last message of each request."""
    return [posted.body["messages"][-1]["content"] for posted in server.posted]


def contents(server: FakeOpenAI) -> list[list[str]]:
    return [[message["content"] for message in posted.body["messages"]] for posted in server.posted]


# --- what is typed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_lines_that_are_pasted_are_one_message(server: FakeOpenAI, end: str) -> None:
    for reply in ("Eins", "Zwei", "Drei"):
        server.says(*answer(reply))
    with Terminal("chat", "--server", server.url) as terminal:
        terminal.wait_for("> ")
        terminal.type(PASTED.format(end.join(["def f():", "    return 1", "", "/reset"])))
        terminal.wait_for("/reset")
        assert not server.posted  # until Enter
        terminal.type("\r")
        terminal.wait_for("Eins")
        terminal.wait_for("> ")
        terminal.type("one\x1b\rtwo\r")  # Alt-Enter
        terminal.wait_for("Zwei")
        terminal.wait_for("> ")
        terminal.type("/* a comment\x1b\rint x; */\r")
        terminal.wait_for("Drei")
        terminal.wait_for("> ")
        terminal.type(CTRL_D)
        assert terminal.end() == 0
    assert asked(server) == ["def f():\n    return 1\n\n/reset", "one\ntwo", "/* a comment\nint x; */"]


def test_each_line_of_a_pipe_is_a_message(shell: Shell, server: FakeOpenAI) -> None:
    for _ in range(2):
        server.says(*answer("Ja"))
    assert shell("chat", "--server", server.url, stdin="One\nTwo\n").out == "Ja\nJa\n"
    assert asked(server) == ["One", "Two"]


def test_ctrl_c_drops_what_is_typed_and_leaves_when_there_is_nothing(server: FakeOpenAI) -> None:
    with Terminal("chat", "--server", server.url) as terminal:
        terminal.wait_for("> ")
        for text in ("never", "sent"):
            terminal.type(text)
            terminal.wait_for(text)
            terminal.type(CTRL_C)
            assert "once more" not in terminal.wait_for("\n> ")
        terminal.type(CTRL_C)
        terminal.wait_for("(Ctrl-C once more, Ctrl-D or /quit leaves)\n> ")
        terminal.type(CTRL_C)
        assert terminal.end() == 130
    assert not server.posted


def test_what_was_typed_comes_back_in_the_next_session(server: FakeOpenAI, tmp_path: Path) -> None:
    for _ in range(3):
        server.says(*answer("Ja"))
    state = {"XDG_STATE_HOME": str(tmp_path / "state")}
    with Terminal("chat", "--server", server.url, **state) as terminal:
        for text in ("first\r", PASTED.format("one\ntwo") + "\r"):
            terminal.wait_for("> ")
            terminal.type(text)
            terminal.wait_for("Ja")
        terminal.wait_for("> ")
        terminal.type("/quit\r")
        assert terminal.end() == 0
    [file] = (path for path in tmp_path.rglob("*") if path.is_file())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with Terminal("chat", "--server", server.url, **state) as terminal:
        terminal.wait_for("> ")
        terminal.type(UP + UP)
        terminal.wait_for("two")
        terminal.type("\r")
        terminal.wait_for("Ja")
        terminal.wait_for("> ")
        terminal.type(CTRL_D)
        assert terminal.end() == 0
    assert asked(server) == ["first", "one\ntwo", "one\ntwo"]


@pytest.mark.parametrize("home", ["/dev/null", "/proc/nowhere"])
def test_a_history_that_cannot_be_kept_is_no_error(server: FakeOpenAI, home: str) -> None:
    server.says(*answer("Ja"))
    with Terminal("chat", "--server", server.url, XDG_STATE_HOME=home) as terminal:
        terminal.wait_for("> ")
        terminal.type("Hello\r")
        assert "rror" not in terminal.wait_for("Ja")
        terminal.wait_for("> ")
        terminal.type(CTRL_D)
        assert terminal.end() == 0


@pytest.mark.parametrize(("number", "length"), [(_lines.KEPT_MESSAGES + 1, 5), (4, _lines.KEPT_BYTES // 3)])
def test_a_long_history_loses_its_oldest_messages(tmp_path: Path, number: int, length: int) -> None:
    file = tmp_path / "chat-history"
    file.write_bytes(b"\xff no history\n")  # what is damaged is passed over
    file.chmod(0o644)
    history = _lines.history(file)
    messages = [f"{i}:" + "x" * length for i in range(number)]
    for message in messages:
        history.store_string(message)
    kept = list(_lines.history(file).load_history_strings())
    assert 0 < len(kept) <= _lines.KEPT_MESSAGES and kept == messages[::-1][: len(kept)]
    assert file.stat().st_size <= _lines.KEPT_BYTES
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [file]


# --- commands -------------------------------------------------------------------------------------------------------


def test_commands(shell: Shell, server: FakeOpenAI) -> None:
    server.says(*answer("A file"))
    server.says(*answer("A comment"))
    typed = "/help\n/hepl\n/HELP\n/exti\n/etc/hosts is what?\n// what is this?\n/resets\n/quit\nnever read\n"
    result = shell("chat", "--server", server.url, stdin=typed)
    assert (result.code, result.out) == (0, "A file\nA comment\n")
    assert asked(server) == ["/etc/hosts is what?", "// what is this?"]
    said = result.err.splitlines()
    listed = said[1 : said.index("There is no /hepl. Did you mean '/help'? /help lists what there is.")]
    assert [line.split()[0] for line in listed[:3]] == ["/help", "/reset", "/quit"]
    assert said.count(listed[0]) == 2
    assert "There is no /exti. Did you mean '/exit'? /help lists what there is." in said
    assert said[-1] == "There is no /resets. Did you mean '/reset'? /help lists what there is."


@pytest.mark.parametrize("command", ["/quit", "/exit", "quit", "exit", "/QUIT"])
def test_ways_out(shell: Shell, server: FakeOpenAI, command: str) -> None:
    assert shell("chat", "--server", server.url, stdin=f"{command}\nnever read\n").code == 0
    assert not server.posted


def test_tab_completes_a_command(server: FakeOpenAI) -> None:
    with Terminal("chat", "--server", server.url) as terminal:
        terminal.wait_for("> ")
        terminal.type("/re\t")
        terminal.wait_for("set")
        terminal.type("\r")
        terminal.wait_for("The conversation is forgotten.")
        terminal.wait_for("> ")
        terminal.type(CTRL_D)
        assert terminal.end() == 0


# --- a full context -------------------------------------------------------------------------------------------------

TOO_LONG = [
    {"message": "The prompt has 9 tokens.", "type": "invalid_request_error", "code": "context_length_exceeded"},
    {"message": "the request exceeds the available context size", "type": "exceed_context_size_error", "code": 400},
    {
        "message": "This model's maximum context length is 9 tokens. However, ...",
        "type": "BadRequestError",
        "code": 400,
    },
]


@pytest.mark.parametrize("error", TOO_LONG, ids=["openai", "llama.cpp", "vllm"])
def test_where_a_server_has_no_room_the_oldest_turns_go(
    shell: Shell, server: FakeOpenAI, error: dict[str, Any]
) -> None:
    server.says(*answer("a"))
    server.says(*answer("b"))
    server.says(json.dumps({"error": error}).encode(), status=400)
    server.says(*answer("c"))
    for _ in range(3):
        server.says(json.dumps({"error": error}).encode(), status=400)
    server.says(*answer("e"))
    result = shell("chat", "--server", server.url, "--system", "S", stdin="A\nB\nC\nfar too long\nE\n")
    assert (result.code, result.out) == (0, "a\nb\nc\ne\n")
    assert contents(server) == [
        ["S", "A"],
        ["S", "A", "a", "B"],
        ["S", "A", "a", "B", "b", "C"],
        ["S", "B", "b", "C"],
        ["S", "B", "b", "C", "c", "far too long"],  # which never fits: nothing is dropped for it
        ["S", "C", "c", "far too long"],
        ["S", "far too long"],
        ["S", "B", "b", "C", "c", "E"],
    ]
    said = result.err.splitlines()[1:]
    assert said[0] == "(The context is full: the oldest turn is dropped.)"
    assert said[1].startswith(f"tinyserve: {server.url} says: ") and len(said) == 2 + (said[-1] == "")


def test_of_many_turns_several_go_at_once(shell: Shell, server: FakeOpenAI) -> None:
    for i in range(9):
        server.says(*answer(str(i)))
    server.says(json.dumps({"error": TOO_LONG[0]}).encode(), status=400)
    server.says(*answer("9"))
    result = shell("chat", "--server", server.url, stdin="".join(f"Q{i}\n" for i in range(10)))
    assert "(The context is full: the 2 oldest turns are dropped.)" in result.err
    assert contents(server)[-1][0] == "Q2"


def test_what_a_server_has_counted_tells_that_its_context_is_full(shell: Shell) -> None:
    """It would take the prompt, and have room for a word of an answer."""
    with FakeOpenAI([{"id": "first", "max_model_len": 100}]) as server:
        server.says(delta("a"), delta("", "stop"), usage(50, 40), DONE)
        server.says(*answer("b"))
        result = shell("chat", "--server", server.url, stdin="A\nB\n")
        assert contents(server) == [["A"], ["B"]]
    assert result.out == "a\nb\n"
    assert "(The context is full: the oldest turn is dropped.)" in result.err


def test_where_a_model_here_has_no_room_the_oldest_turns_go(shell: Shell, tmp_path: Path) -> None:
    folder = checkpoints.write_folder(tmp_path / "model", checkpoints.CONFIGS["llama"])
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"})
    )
    llm, params = LLM(folder), SamplingParams(temperature=0, max_tokens=4)
    long = "y" * (llm.max_model_len // 2)

    def expected(*said: str) -> str:
        roles = ["system", *(["user", "assistant"] * len(said))]
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
        return llm.chat(messages, params)[0].outputs[0].text

    first = expected("S", long)
    second = expected("S", long[:-5])  # without the first: both are more than the context holds
    third = expected("S", long[:-5], second, "Hi")
    result = shell("chat", folder, "--system", "S", "--max-tokens", "4", stdin=f"{long}\n{long[:-5]}\nHi\n")
    assert result.out == f"{first}\n{second}\n{third}\n"
    assert result.err.count("(The context is full: the oldest turn is dropped.)") == 1
    assert "tinyserve: The prompt" not in result.err


# --- on a terminal --------------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """A terminal so many columns wide, and what stands in its rows."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns, self.rows, self.column = columns, [""], 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        rest = text
        while rest:
            if rest.startswith("\x1b["):
                end = next(i for i, c in enumerate(rest) if c.isalpha())
                number, letter, rest = rest[2:end], rest[end], rest[end + 1 :]
                assert letter in "DK"
                if letter == "D":
                    self.column -= int(number)
                    assert self.column >= 0
                else:
                    self.rows[-1] = self._cells()[: self.column]
                continue
            character, rest = rest[0], rest[1:]
            if character == "\n":
                self._begin_row()
                continue
            width = 2 if character > "\u2e80" else 1
            if self.column + width > self.columns:
                self._begin_row()
            self.rows[-1] = self._cells()[: self.column] + character + "\0" * (width - 1)
            self.column += width
        return len(text)

    def _cells(self) -> str:
        return self.rows[-1]

    def _begin_row(self) -> None:
        self.rows.append("")
        self.column = 0

    @property
    def lines(self) -> list[str]:
        return [row.replace("\0", "").rstrip() for row in self.rows]


TEXTS = {
    "words": ("The quick brown fox jumps", ["The quick", "brown fox", "jumps"]),
    "a word that just fits": ("123456789 abcdefghi x", ["123456789", "abcdefghi", "x"]),
    "spaces at the end of a row": ("12345678  abc   def", ["12345678", "abc   def"]),
    "lines of its own": ("one\n\ntwo three four", ["one", "", "two three", "four"]),
    "a long word": ("see https://example.org/x now", ["see", "https://ex", "ample.org/", "x now"]),
    "a long word that fills rows": ("0123456789 ab cd", ["0123456789", "ab cd"]),
    "code": ("so:\n```py\nreturn one + two\n```\nand more words", [
        "so:", "```py", "return one", " + two", "```", "and more", "words",
    ]),
    "code in another fence": ("~~~\n```\nreturn one + two\n~~~\nand more words", [
        "~~~", "```", "return one", " + two", "~~~", "and more", "words",
    ]),
    "indented code": ("    x = a + b", ["    x = a", "+ b"]),
    "a table": ("| a | b | c |", ["| a | b |", "c |"]),
    "wide letters": ("日本 日本 日本", ["日本 日本", "日本"]),
    "wide letters without spaces": ("日本日本日本", ["日本日本日", "本"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_answers_wrap_at_spaces(monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    """Whatever the pieces are; each is seen as soon as it is there."""
    text, rows = TEXTS[name]
    monkeypatch.setattr(sys, "stdout", screen := Screen(10))
    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setenv("TERM", "xterm")
    printer = AnswerPrinter(LoadProgress("m"))
    for start in range(0, len(text), size):
        printer.write(Piece(text[start : start + size]))
        seen = "".join(screen.lines).replace(" ", "")
        assert seen == text[: start + size].replace(" ", "").replace("\n", "")
    assert printer.text == text
    assert [line.strip() for line in screen.lines] == [row.strip() for row in rows]


@pytest.mark.parametrize("settings", [{"COLUMNS": "10", "TERM": "dumb"}, {"COLUMNS": "80", "TERM": "xterm"}])
def test_what_need_not_or_cannot_be_wrapped(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]) -> None:
    monkeypatch.setattr(sys, "stdout", screen := Screen(1000))
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    AnswerPrinter(LoadProgress("m")).write(Piece("The quick brown fox jumps"))
    assert screen.lines == ["The quick brown fox jumps"]


@pytest.mark.parametrize("command", [["ask", "Hello"], ["chat"]])
def test_a_narrow_terminal(server: FakeOpenAI, command: Sequence[str]) -> None:
    server.says(*(delta(piece) for piece in ("The qu", "ick brown f", "ox jumps over the la", "zy dog")), *answer("."))
    with Terminal(*command, "--server", server.url, columns=16) as terminal:
        if command == ["chat"]:
            terminal.wait_for("> ")
            terminal.type("Hello\r")
        assert terminal.wait_for("dog.").endswith("The quick brown\nfox jumps over \nthe lazy dog.")
        if command == ["chat"]:
            terminal.wait_for("> ")
            terminal.type(CTRL_D)
        assert terminal.end() == 0


def test_nothing_is_wrapped_in_a_pipe(shell: Shell, server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "word " * 40 + "end"
    server.says(*answer(text))
    monkeypatch.setenv("COLUMNS", "20")
    assert shell("chat", "--server", server.url, stdin="Hello\n").out == f"{text}\n"
