"""The access log: a line for each request, whatever becomes of it, and nothing where it is not asked for."""

import json
import logging
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx2 as httpx
import pytest
from hold import hold
from servers import Running, running

from tinyserve.server.guards import Admission

TEXT = "/v1/completions"
KEY = {"authorization": "Bearer secret"}
LINE = re.compile(r"127\.0\.0\.1 (.*) \d+ ms(.*)")


@contextmanager
def logged() -> Iterator[Callable[[], str]]:
    """The next line that is logged; a line follows its response, so that each must be waited for."""
    queue: SimpleQueue[Any] = SimpleQueue()
    handler, logger = QueueHandler(queue), logging.getLogger("tinyserve.server.access")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lambda: queue.get(timeout=60).getMessage()
        assert queue.empty()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@pytest.fixture(scope="module")
def server(folder_of: Callable[[str], Path]) -> Iterator[Running]:
    admission = Admission(max_body=100_000, api_keys=["secret"])
    options: dict[str, Any] = {"admission": admission, "app": {"access_log": True}, "num_threads": 1}
    with ExitStack() as stack:
        with logged() as lines:
            one = stack.enter_context(running({"tiny": folder_of("granite-hybrid")}, dtype="float32", **options))
            assert one.post("/tokenize", {"prompt": "a"}, **KEY).status_code == 200  # the model is loaded
            assert [said(lines()) for _ in range(2)] == ["POST /tokenize 401", "POST /tokenize 200"]
        yield one


@pytest.fixture
def lines() -> Iterator[Callable[[], str]]:
    with logged() as lines:
        yield lines


def said(line: str) -> str:
    """A line without the address and the time, which it must have."""
    match = LINE.fullmatch(line)
    assert match, line
    return match[1] + match[2]


ASKED = {"prompt": "ab", "max_tokens": 5, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_an_answer_has_its_tokens(server: Running, lines: Callable[[], str], stream: bool, n: int) -> None:
    response = server.post(TEXT, {**ASKED, "n": n, "stream": stream, "stream_options": {"include_usage": True}}, **KEY)
    last = json.loads(response.text.split("data: ")[-2]) if stream else response.json()
    counted = last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]
    assert counted[1] == 5 * n
    assert said(lines()) == f"POST {TEXT} 200 {counted[0]}+{counted[1]} tokens"


def test_several_prompts_are_added_up_and_requests_are_not(server: Running, lines: Callable[[], str]) -> None:
    for _ in range(2):
        usage = server.post(TEXT, {**ASKED, "prompt": ["ab", "abc"]}, **KEY).json()["usage"]
        assert said(lines()) == f"POST {TEXT} 200 {usage['prompt_tokens']}+10 tokens"
    read = server.post("/v1/embeddings", {"input": "abc"}, **KEY).json()["usage"]["prompt_tokens"]
    assert said(lines()) == f"POST /v1/embeddings 200 {read}+0 tokens"


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "line"),
    [
        ("GET", "/health", None, {}, "GET /health 200"),
        ("GET", "/stats?api_key=hidden", None, KEY, "GET /stats 200"),
        ("GET", "/v1/models", None, {}, "GET /v1/models 401"),
        ("GET", "/nothing", None, KEY, "GET /nothing 404"),
        ("DELETE", "/health", None, KEY, "DELETE /health 405"),
        ("POST", TEXT, b"{", KEY | {"content-type": "application/json"}, f"POST {TEXT} 400"),
        ("POST", TEXT, b"x" * 100_001, KEY, f"POST {TEXT} 413"),
        ("GET", "/a%0Ab%20c%22", None, KEY, "GET /a%0Ab%20c%22 404"),
        ("GET", f"/{'x' * 500}", None, KEY, f"GET /{'x' * 199}... 404"),
    ],
)
def test_what_is_refused_is_logged_too(
    server: Running, lines: Callable[[], str], method: str, path: str, body: Any, headers: dict[str, str], line: str
) -> None:
    with server.client() as client:
        client.request(method, path, content=body, headers=headers)
    assert said(lines()) == line


def test_a_mistake_of_the_servers_own_is_a_500(
    server: Running, lines: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.state.metrics, "text", lambda: 1 / 0)
    assert server.get("/metrics", **KEY).status_code == 500
    assert said(lines()) == "GET /metrics 500"


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_is_told_apart(server: Running, lines: Callable[[], str], stream: bool) -> None:
    body = json.dumps({**ASKED, "prompt": "ab" * 10, "max_tokens": 50, "stream": stream})
    head = f"POST {TEXT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nAuthorization: Bearer secret\r\n"
    url = httpx.URL(server.url)
    with hold(server.engine.llm, after=2) as held:
        with socket.create_connection((url.host, url.port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            assert held.started.wait(60)
            if stream:
                assert connection.recv(10)
        line = said(lines())
    assert line == (f"POST {TEXT} 200 client left" if stream else f"POST {TEXT} 499")


def test_a_log_that_cannot_be_written_disturbs_no_request(server: Running, lines: Callable[[], str]) -> None:
    class Full:
        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

        def flush(self) -> None: ...

    logger = logging.getLogger("tinyserve.server.access")
    handler = logging.StreamHandler(Full())
    logger.addHandler(handler)
    try:
        assert server.post(TEXT, ASKED, **KEY).status_code == 200
        assert server.get("/health").status_code == 200
    finally:
        logger.removeHandler(handler)
    assert [said(lines()).split()[2] for _ in range(2)] == ["200", "200"]


def test_nothing_is_logged_by_default(folder_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with running({"tiny": folder_of("llama")}, dtype="float32", num_threads=1) as silent:
        assert silent.post(TEXT, ASKED).status_code == 200
        assert silent.post("/silent", ASKED).status_code == 404
    # A line follows its response, so that one of another test's server may come only now.
    logged = [record.getMessage() for record in caplog.records if record.name == "tinyserve.server.access"]
    assert [line for line in logged if TEXT in line or "/silent" in line] == []
