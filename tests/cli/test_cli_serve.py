"""`tinyserve serve` as a process: what it refuses to start with, how it says where it is, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import httpx2 as httpx
import pytest
from command_line import Shell

from tinyserve.cli.serve import keys, names
from tinyserve.errors import UserError
from tinyserve.server import run
from tinyserve.server.run import listen, listens_on_loopback


class Process:
    """A server in a process, up and answering."""

    def __init__(self, *arguments: str, **environment: str):
        command = [sys.executable, "-m", "tinyserve", "serve", *arguments, "--port", "0"]
        self._process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | environment
        )
        assert self._process.stderr is not None
        found = None
        while found is None:
            line = self._process.stderr.readline()
            assert line, "the server ended"
            found = re.search(r"http://\S+", line)
        self.url = found.group()
        self.client = httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    def wait_ready(self) -> None:
        assert self.client.post("/tokenize", json={"prompt": "a"}).status_code == 200

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """The exit code, and the rest of what it said."""
        _, errors = self._process.communicate(timeout=120)
        return self._process.returncode, errors

    def kill(self) -> None:
        self.client.close()
        self._process.kill()
        self._process.wait()


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Process]:
    process = Process(*arguments, **environment)
    try:
        yield process
    finally:
        process.kill()


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.delenv("TINYSERVE_API_KEY", raising=False)
    return Shell(monkeypatch, capsys)


@pytest.fixture
def arguments(folder_of: Callable[[str], Path]) -> list[str]:
    return [f"tiny={folder_of('llama')}", "--dtype", "float32", "--threads", "1"]


LONG = {"prompt": "ab", "max_tokens": 120, "ignore_eos": True, "stream": True}


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(arguments: list[str]) -> None:
    with serving(*arguments) as server:
        server.wait_ready()
        with server.client.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data:")
            server.signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and any('"finish_reason":"length"' in line for line in rest)
        with suppress(httpx.TransportError):  # unless it still answers, for a moment
            assert httpx.get(f"{server.url}/health", trust_env=False).status_code == 503
        code, errors = server.end()
        assert code == 0 and "once more stops at once" in errors


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_an_idle_server_ends_at_the_first_signal(arguments: list[str], number: signal.Signals, code: int) -> None:
    with serving(*arguments) as server:
        server.wait_ready()
        server.signal(number)
        assert server.end()[0] == code


def test_the_drain_has_an_end_and_a_second_signal_ends_at_once(arguments: list[str]) -> None:
    for seconds, second in ((1, None), (100, signal.SIGTERM)):
        with serving(*arguments, "--drain-timeout", str(seconds)) as server:
            server.wait_ready()
            # A client that does not read keeps its answer running once the buffers are full; so does an open request.
            with socket.create_connection((httpx.URL(server.url).host, httpx.URL(server.url).port)) as open_request:
                open_request.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 100\r\n\r\n{"
                )
                wait_for_request(server)
                server.signal(signal.SIGTERM)
                if second is not None:
                    assert said(server, "once more")
                    server.signal(second)
                assert server.end()[0] == (0 if second is None else 128 + signal.SIGTERM)


def wait_for_request(server: Process) -> None:
    """Requests are read in order of arrival: when a later one is answered, the open one is being served."""
    assert server.client.get("/health").status_code == 200


def said(server: Process, words: str) -> bool:
    """Read the server's words up to these."""
    stream = server._process.stderr
    assert stream is not None
    return any(words in line for line in iter(stream.readline, ""))


def test_a_model_that_is_loading_does_not_hold_up_the_end(smollm2: Path) -> None:
    with serving(f"slow={smollm2}") as server:
        assert server.client.get("/health").status_code == 200
        server.signal(signal.SIGTERM)
        assert server.end()[0] == 0


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with serving(f"none={tmp_path}") as server:
        code, errors = server.end()
    assert code == 2 and f"tinyserve: {tmp_path}/config.json is not JSON" in errors


def test_a_chat_template_may_be_the_servers_own(arguments: list[str], tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0].content }}, at length:")
    with serving(*arguments, "--chat-template", str(template)) as server:
        body = {"messages": [{"role": "user", "content": "Tell"}]}
        assert server.client.post("/apply-template", json=body).json() == {"prompt": "Tell, at length:"}


def test_keys_come_from_the_environment(arguments: list[str]) -> None:
    with serving(*arguments, TINYSERVE_API_KEY="secret") as server:
        assert server.client.get("/v1/models").status_code == 401
        assert server.client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        listed = subprocess.run(["ps", "-o", "args=", "-p", str(server._process.pid)], capture_output=True, text=True)
        assert "secret" not in listed.stdout


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_the_access_log_is_on_stderr(arguments: list[str], quiet: tuple[str, ...]) -> None:
    with serving(*arguments, "--access-log", *quiet) as server:
        server.wait_ready()
        server.signal(signal.SIGTERM)
        code, errors = server.end()
    assert code == 0
    assert re.search(r"^\d\d:\d\d:\d\d 127\.0\.0\.1 POST /tokenize 200 \d+ ms$", errors, re.MULTILINE)


def test_a_log_that_nobody_reads_any_more_disturbs_no_request(arguments: list[str]) -> None:
    with serving(*arguments, "--access-log") as server:
        assert server._process.stderr is not None
        server._process.stderr.close()
        for _ in range(3):
            server.wait_ready()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--host", "nowhere.invalid"], "--no-auth"),
        (["--port", "70000"], "between 0 and 65535"),
        (["--max-queue", "-1"], "--max-queue is -1"),
        (["--threads", "0"], "--threads is 0"),
        (["--memory", "0"], "--memory is 0"),
        (["--dtype", "int3"], "int3"),
        (["--tool-format", "xml"], "hermes"),
        (["--chat-template", "/nowhere/x.jinja"], "The chat template /nowhere/x.jinja cannot be read"),
        (["--chat-template", "{% audio %}"], "The chat template of the option chat_template is no valid Jinja"),
        (["--kv-cache-dtype", "int3"], "int3"),
        (["--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["smolm2"], "smollm2-135m"),
        (["./none.gguf"], "./none.gguf"),
        (["--api-key-file", "/nowhere"], "cannot be read"),
        (["smollm2-135m"], "given twice"),
        (["=x"], "NAME=MODEL"),
    ],
)
def test_what_would_be_wrong_is_refused_at_once(shell: Shell, options: list[str], words: str) -> None:
    result = shell("serve", "smollm2-135m", *options)
    assert result.code == 2 and words in result.sentence


def test_a_port_in_use_is_named(shell: Shell, arguments: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = shell("serve", *arguments, "--port", str(port))
    assert result.code == 2 and f"127.0.0.1:{port}" in result.sentence and "--port" in result.sentence


def test_small_pieces_are_sent_at_once() -> None:
    """asyncio turns Nagle's algorithm off where a socket says that it is TCP: a first token had waited for 40 ms."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_on_windows_a_port_is_shared_with_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """There SO_REUSEADDR lets a second server listen beside the first; another option is what refuses it."""
    monkeypatch.setattr(run, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_KEEPALIVE, raising=False)  # any that can be seen here
    with listen("127.0.0.1", 0) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


def test_names_and_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYSERVE_API_KEY", raising=False)
    odd = tmp_path / "a=b.gguf"
    odd.touch()
    assert names(["gpt2", "x=./y.gguf", str(odd)]) == {"gpt2": "gpt2", "x": "./y.gguf", str(odd): str(odd)}
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst\n\n second \n")
    assert keys(file) == ["first", "second"]
    file.write_text("two words\n")
    with pytest.raises(UserError, match="header"):
        keys(file)
    assert listens_on_loopback("127.8.0.1") and listens_on_loopback("::1") and listens_on_loopback("localhost")
    assert not listens_on_loopback("0.0.0.0") and not listens_on_loopback("example.org")
