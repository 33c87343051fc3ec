"""`ask` and `chat` with --server: what is sent, what is printed, and how it ends when the server does."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import fake_openai
import pytest
from command_line import Children, Shell, Terminal
from fake_openai import DONE, FakeOpenAI, answer, delta, die, wait_for, wait_for_the_client_to_leave

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.delenv("TINYSERVE_API_KEY", raising=False)
    return Shell(monkeypatch, capsys)


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    about = {"max_model_len": 100, "dtype": "w8a16"}
    with FakeOpenAI([{"id": "first", **about}, {"id": "second"}, {"id": "textual", "chat": False}]) as fake:
        yield fake


def sent(server: FakeOpenAI) -> dict[str, Any]:
    """The last request's fields, without those that every request has."""
    body = dict(server.posted[-1].body)
    assert body.pop("stream") is True
    assert body.pop("stream_options") == {"include_usage": True}
    return body


# --- the model and the prompt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "stdin", "model", "prompt"),
    [
        (["Hello there"], "", "first", "Hello there"),
        (["Hello"], "", "first", "Hello"),
        (["second", "Hello"], "", "second", "Hello"),
        (["-m", "second", "Hello"], "", "second", "Hello"),
        (["-m", "second"], "Hello", "second", "Hello"),
        ([], "Hello", "first", "Hello"),
        (["-"], "Hello", "first", "Hello"),
        (["smollm2-135m"], "Hello", "smollm2-135m", "Hello"),
        (["owner/name"], "Hello", "owner/name", "Hello"),
        (["unlisted", "Hello"], "", "unlisted", "Hello"),
        (["smollm2", "Hello"], "", "smollm2-135m", "Hello"),
        (["smollm2", "-m", "360m", "Hello"], "", "smollm2-360m", "Hello"),
    ],
)
def test_which_model_is_asked_what(
    shell: Shell, server: FakeOpenAI, words: list[str], stdin: str, model: str, prompt: str
) -> None:
    server.says(*answer("Hi", " you"))
    result = shell("ask", "--server", server.url, *words, stdin=stdin)
    assert (result.code, result.out) == (0, "Hi you\n")
    assert sent(server) == {"model": model, "max_tokens": 256, "messages": [{"role": "user", "content": prompt}]}


def test_options_are_sent_by_their_names(shell: Shell, server: FakeOpenAI) -> None:
    """And no others: for those the server's defaults are as good as ours."""
    server.says(*answer("Hi"))
    options = (
        "--temp 0.5 --max-tokens 9 --top-k 3 --top-p 0.9 --min-p 0.1 --typical-p 0.8 --top-n-sigma 2 "
        "--repetition-penalty 1.1 --seed 7 --stop a --stop b --system Short."
    )
    assert shell("ask", "Hello", "--server", server.url, *options.split()).code == 0
    assert sent(server) == {
        "model": "first", "temperature": 0.5, "max_tokens": 9, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.8,
        "top_n_sigma": 2.0, "repetition_penalty": 1.1, "seed": 7, "stop": ["a", "b"],
        "messages": [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hello"}],
    }  # fmt: skip


def test_structure(shell: Shell, server: FakeOpenAI) -> None:
    server.says(*answer("{}"))
    assert shell("ask", "Hello", "--server", server.url, "--json-schema", json.dumps(SCHEMA)).code == 0
    form = sent(server)["response_format"]
    assert form == {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    server.says(*answer("7"))
    assert shell("ask", "Hello", "--server", server.url, "--regex", "[0-9]+").code == 0
    assert sent(server)["structured_outputs"] == {"regex": "[0-9]+"}


def test_raw_text_and_models_that_do_not_chat(shell: Shell, server: FakeOpenAI) -> None:
    for words in (("--raw", "Once"), ("textual", "Once")):
        server.says(fake_openai.text(" upon"), fake_openai.text(" a time", "length"), DONE)
        result = shell("ask", "--server", server.url, *words)
        assert (result.code, result.out) == (0, " upon a time\n")
        assert server.posted[-1].path == "/v1/completions"
        model = "first" if "--raw" in words else "textual"
        assert sent(server) == {"model": model, "max_tokens": 256, "prompt": "Once"}
        refused = shell("ask", "--server", server.url, *words, "--system", "Be brief.")
        assert "--system needs a chat template" in refused.sentence
    chat = shell("chat", "textual", "--server", server.url)
    assert "textual has no chat template" in chat.sentence
    assert f"`tinyserve ask textual --server {server.url}`" in chat.sentence


def test_keys(shell: Shell, server: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "for-openai-only")
    for variable, options, expected in (
        ("", (), None),
        ("from-environment", (), "Bearer from-environment"),
        ("from-environment", ("--api-key", "given"), "Bearer given"),
    ):
        monkeypatch.setenv("TINYSERVE_API_KEY", variable)
        server.says(*answer("Hi"))
        assert shell("ask", "Hello", "--server", server.url, *options).code == 0
        assert [asked.headers.get("Authorization") for asked in server.asked[-2:]] == [expected] * 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--dtype", "int8"), "--dtype is the server's to decide"),
        (("--threads", "1"), "--threads is the server's to decide"),
        (("--chat-template", "x.jinja"), "--chat-template is the server's to decide"),
        (("--temp", "-1"), "temperature is -1.0; it must be"),
        (("--json-schema", "{"), "json is no JSON"),
        (("--server", "ftp://x"), "begins with ftp://"),
        (("--api-key", "a\nb"), "no HTTP header carries"),
    ],
)
def test_what_is_wrong_is_said_before_anybody_is_asked(
    shell: Shell, server: FakeOpenAI, options: tuple[str, ...], says: str
) -> None:
    result = shell("ask", "--server", server.url, "Hello", *options)
    assert result.code == 2
    assert says in result.sentence
    if not says.startswith("json"):
        assert says in shell("chat", "--server", server.url, *options).sentence
    assert server.asked == []


def test_a_key_without_a_server(shell: Shell) -> None:
    for command in (("ask", "Hello"), ("chat",)):
        assert "--api-key is for a server" in shell(*command, "--api-key", "k").sentence


def test_a_server_without_models(shell: Shell, server: FakeOpenAI) -> None:
    server.models = []
    assert "lists no model: name the one you mean" in shell("ask", "Hello", "--server", server.url).sentence
    server.says(*answer("Hi"))
    assert shell("ask", "hidden", "Hello", "--server", server.url).out == "Hi\n"


# --- what is printed ------------------------------------------------------------------------------------------------


def test_statistics_are_what_is_known(shell: Shell, server: FakeOpenAI) -> None:
    server.says(*answer("a", "b", "c", finish="length", prompt=12, cached=8))
    result = shell("ask", "Hello", "--server", server.url)
    assert re.fullmatch(
        r"\[first · prefill 12 tokens, 8 of them cached · first token after \d+\.\d\d s · 3 tokens at \d+/s · w8a16 · "
        r"cut off at --max-tokens 3\]\n",
        result.err,
    ), result.err
    server.says(*answer("a", "b", finish="length", prompt=98))
    assert shell("ask", "Hello", "--server", server.url).err.endswith("cut off where the context is full]\n")
    server.says(delta("a"), delta(None, "length"), DONE)  # no usage
    silent = shell("ask", "second", "Hello", "--server", server.url)
    assert re.fullmatch(r"\[second · first token after \d+\.\d\d s · cut off at --max-tokens\]\n", silent.err)
    server.says(*answer("a"))
    quiet = shell("ask", "Hello", "--server", server.url, "-q")
    assert (quiet.out, quiet.err) == ("a\n", "")


def test_json_has_the_same_keys_as_for_a_model_here(shell: Shell, server: FakeOpenAI) -> None:
    server.says(*answer("ü", "b", prompt=12, cached=8))
    result = shell("ask", "Hello", "--server", server.url, "--json")
    assert (result.code, result.err, result.out.count("\n")) == (0, "", 1)
    report = json.loads(result.out)
    assert report.pop("time_to_first_token_seconds") > 0
    assert report.pop("decode_tokens_per_second") > 0
    assert report == {
        "text": "üb", "token_ids": None, "model": "first", "load_seconds": None, "prompt_tokens": 12,
        "cached_tokens": 8, "prefill_tokens_per_second": None, "output_tokens": 2, "finish_reason": "stop",
        "dtype": "w8a16", "threads": None,
    }  # fmt: skip


def test_verbose_says_what_is_asked_for(shell: Shell, server: FakeOpenAI) -> None:
    server.says(*answer("Hi"))
    result = shell("ask", "Hello", "--server", server.url, "--temp", "0.5", "-v", "-q")
    assert [" ".join(line.split()) for line in result.err.splitlines()] == [
        f"asked {server.url}/v1/chat/completions", "model first", "temperature 0.5 [--temperature]",
        "max_tokens 256 [the command's own]", "prompt by the model's chat template", "all else as the server has it",
    ]  # fmt: skip


def test_the_progress_line_shows_what_the_server_does(server: FakeOpenAI) -> None:
    shown, more = threading.Event(), threading.Event()
    server.says(b": load first 1/4\n\n", wait_for(shown), b": prefill 5/10\n\n", wait_for(more), *answer("Hi"))
    with Terminal("ask", "Hello", "--server", server.url, "-q") as terminal:
        terminal.wait_for(f"asking {server.url}")
        terminal.wait_for(f"waiting for {server.url}")
        terminal.wait_for("loading first: 25 %")
        shown.set()
        terminal.wait_for("reading the prompt: 50 %")
        more.set()
        terminal.wait_for("Hi\n")
        assert terminal.end() == 0


# --- the end --------------------------------------------------------------------------------------------------------


def test_nobody_there(shell: Shell) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{bound.getsockname()[1]}"
        for command in (("ask", "Hello"), ("chat",)):
            result = shell(*command, "--server", url)
            assert result.code == 1
            assert result.sentence.startswith(f"Nothing answers at http://{url} (")
            assert "is `tinyserve serve` running there?" in result.sentence


def test_an_answer_that_breaks_off(shell: Shell, server: FakeOpenAI) -> None:
    """What came is on stdout, in a line of its own; with --json there is no half of an object."""
    for form, out in (((), "Half of\n"), (("--json",), "")):
        server.says(delta("Half"), delta(" of"), die)
        result = shell("ask", "Hello", "--server", server.url, *form)
        assert (result.code, result.out) == (1, out)
        assert re.fullmatch(rf"tinyserve: The connection to {server.url} broke \(.*\n", result.err)


@pytest.mark.parametrize(("status", "code"), [(400, 2), (401, 2), (404, 2), (429, 1), (500, 1), (503, 1)])
def test_exit_codes(shell: Shell, server: FakeOpenAI, status: int, code: int) -> None:
    server.says(b'{"error": {"message": "Because"}}', status=status)
    result = shell("ask", "Hello", "--server", server.url)
    assert result.code == code
    assert server.url in result.sentence
    assert ("Because" in result.sentence) is (status != 401)


@pytest.mark.parametrize("said", [b"Hi", b""])
def test_ctrl_c_cancels_at_the_server(start: Children, server: FakeOpenAI, said: bytes) -> None:
    """In the middle of the answer, and before there is any."""
    arrived = threading.Event()
    server.says(lambda _: arrived.set(), delta(said.decode()), wait_for_the_client_to_leave)
    process = start("ask", "Hello", "--server", server.url)
    assert process.stdout is not None
    assert arrived.wait(60)
    assert process.stdout.read(len(said)) == said
    process.send_signal(signal.SIGINT)
    assert server.closed.wait(60)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"\n" if said else b"", b"")


def test_a_closed_pipe_cancels_at_the_server(start: Children, server: FakeOpenAI) -> None:
    gone = threading.Event()
    server.says(delta("Hi"), wait_for(gone), delta("more"), wait_for_the_client_to_leave)
    process = start("ask", "Hello", "--server", server.url)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(2) == b"Hi"
    process.stdout.close()
    gone.set()
    assert server.closed.wait(60)
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


# --- chat -----------------------------------------------------------------------------------------------------------


def test_chat_keeps_the_conversation_here(shell: Shell, server: FakeOpenAI) -> None:
    for reply in ("Eins", "Zwei", "Drei"):
        server.says(*answer(reply))
    typed = "One\n\nTwo\n/reset\nThree\n/exit\n"
    result = shell("chat", "--server", server.url, "--system", "S", "--max-tokens", "5", stdin=typed)
    assert (result.code, result.out) == (0, "Eins\nZwei\nDrei\n")
    assert result.err.startswith(f"first at {server.url}. /help lists")
    said = [[message["content"] for message in asked.body["messages"]] for asked in server.posted]
    assert said == [["S", "One"], ["S", "One", "Eins", "Two"], ["S", "Three"]]
    assert all(asked.body["max_tokens"] == 5 for asked in server.posted)


def test_chat_survives_its_server(shell: Shell, server: FakeOpenAI) -> None:
    """What failed is not part of the conversation."""
    server.says(b'{"error": {"message": "Too long"}}', status=400)
    server.says(delta("Ha"), die)
    server.says(*answer("Hi"))
    result = shell("chat", "--server", server.url, stdin="One\nTwo\nThree\n")
    assert (result.code, result.out) == (0, "Ha\nHi\n")
    _, refused, broken, _ = result.err.split("\n", 3)
    assert refused == f"tinyserve: {server.url} says: Too long. (/reset begins anew)"
    assert broken.startswith(f"tinyserve: The connection to {server.url} broke (") and broken.endswith("there?")
    assert [message["content"] for message in server.posted[-1].body["messages"]] == ["Three"]


def test_chat_stops_an_answer_at_the_server(server: FakeOpenAI) -> None:
    server.says(delta("Endless"), wait_for_the_client_to_leave)
    server.says(*answer("Fine"))
    with Terminal("chat", "--server", server.url) as terminal:
        terminal.wait_for("> ")
        terminal.type("Hello\n")
        terminal.wait_for("Endless")
        terminal.wait_until_it_sleeps()
        terminal.type("\x03")
        terminal.wait_for("[stopped]")
        assert server.closed.wait(60)
        terminal.wait_for("> ")
        terminal.type("Go on\n")
        terminal.wait_for("Fine")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.end() == 0
    said = [message["content"] for message in server.posted[-1].body["messages"]]
    assert said == ["Hello", "Endless", "Go on"]


def test_nothing_heavy_is_imported(server: FakeOpenAI) -> None:
    server.says(*answer("Hi"))
    script = f"import sys; from tinyserve import cli; cli.run(['ask', 'Hi', '--server', '{server.url}'])"
    shown = subprocess.run(
        [sys.executable, "-c", f"{script}; print(*sys.modules)"], check=True, capture_output=True, text=True
    ).stdout
    loaded = set(shown.splitlines()[-1].split())
    assert "httpx2" in loaded
    assert not loaded & {"numpy", "numba", "tokenizers", "huggingface_hub", "jinja2", "tinyserve.llm"}
