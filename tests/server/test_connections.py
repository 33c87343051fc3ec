"""Connections that ask for nothing, or for what is none: they are closed, make room for others, and fill no log."""

import asyncio
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from servers import Running, running

from tinyserve.server import connections, guards
from tinyserve.server.connections import most_connections, tell_once_of_no_files

MOST = 12


@pytest.fixture(scope="module")
def server(folder_of: Callable[[str], Path]) -> Iterator[Running]:
    with running({"tiny": folder_of("llama")}, connections=MOST, dtype="float32", num_threads=1) as one:
        yield one


def connect(server: Running, sent: bytes = b"") -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    one = socket.create_connection((host, int(port)), timeout=20)
    one.sendall(sent)
    return one


def is_closed(one: socket.socket) -> bool:
    """Whether the other side closes it; TimeoutError if it does not."""
    try:
        while one.recv(1000):
            pass
    except ConnectionError:
        return True
    return True


HEADERS = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.mark.parametrize("sent", [b"", HEADERS[:5], HEADERS + b"X-a: "])
def test_headers_that_are_never_finished_are_not_waited_for(
    server: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    start = time.monotonic()
    with connect(server, sent) as one:
        assert is_closed(one)
    assert time.monotonic() - start < 10


def test_a_second_request_has_its_time_as_the_first(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.5)
    connection = HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    for pause in (0.0, 1.0):  # idle, and not in the middle of headers: kept
        time.sleep(pause)
        connection.request("GET", "/health")
        assert connection.getresponse().read()
    connection.sock.sendall(HEADERS)
    assert is_closed(connection.sock)
    connection.close()


def test_an_answer_may_take_longer_than_headers(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.05)
    body = {"prompt": "a", "max_tokens": 100, "ignore_eos": True}
    assert server.post("/v1/completions", body).json()["usage"]["completion_tokens"] == 100


def test_whoever_asks_for_nothing_makes_room(server: Running) -> None:
    with ExitStack() as held:
        idle = [held.enter_context(connect(server, HEADERS)) for _ in range(4 * MOST)]
        for _ in range(3):
            assert server.get("/health").status_code == 200
        for one in idle[: 2 * MOST]:  # the oldest
            assert is_closed(one)


def test_files_are_left_for_the_process() -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for limit, most in ((256, 192), (96, 32), (64, 8)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            assert most_connections() == most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_without_files_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.new_event_loop()
    tell_once_of_no_files(loop)
    for number in (errno.EMFILE, errno.ENFILE) * 50:
        loop.call_exception_handler({"message": "accept", "exception": OSError(number, os.strerror(number))})
    assert [record.getMessage() for record in caplog.records if "no file left" in record.getMessage()] != []
    assert len(caplog.records) == 1
    with caplog.at_level(logging.ERROR):
        loop.call_exception_handler({"message": "something else", "exception": ValueError("a mistake")})
    assert "something else" in caplog.text
    loop.close()


def answer_to(one: socket.socket) -> tuple[int, dict[str, Any]]:
    """The status and the body of a response."""
    response = HTTPResponse(one)
    response.begin()
    return response.status, json.loads(response.read())


POST = b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: %b\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("path", "kind", "status"),
    [
        (b"/tokenize", b"text/plain", 415),
        (b"/health", b"text/plain", 405),
        (b"/nothing", b"text/plain", 404),
    ],
)
def test_whoever_still_sends_hears_why_he_is_refused(server: Running, path: bytes, kind: bytes, status: int) -> None:
    """A connection that is closed with bytes unread is reset, and its answer is lost."""
    size = 3_000_000
    for _ in range(5):
        with connect(server, POST % (path, kind) + b"Content-Length: %d\r\n\r\n" % size) as one:
            for _ in range(size // 100_000):
                one.sendall(b" " * 100_000)
            assert answer_to(one)[0] == status


def test_a_rest_that_does_not_come_is_not_waited_for(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "REST_SECONDS", 0.2)
    with connect(server, POST % (b"/nothing", b"text/plain") + b"Content-Length: 1000\r\n\r\nab") as one:
        assert answer_to(one)[0] == 404


def test_who_asks_before_he_sends_is_not_told_to_go_on(server: Running) -> None:
    head = POST % (b"/nothing", b"text/plain") + b"Content-Length: 1000\r\nExpect: 100-continue\r\n\r\n"
    with connect(server, head) as one:
        assert one.recv(1000).startswith(b"HTTP/1.1 404 ")


CHUNKED = POST % (b"/tokenize", b"application/json") + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /" + b"x" * 70_000,
        CHUNKED + b"zz\r\n",
        CHUNKED + b"5\r\nab",
    ],
)
def test_what_is_no_http_is_told_and_leaves_no_traceback(
    server: Running, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    """Also where its body breaks off, and a handler waits for the rest."""
    with connect(server, sent) as one:
        if not sent.endswith(b"ab"):
            status, body = answer_to(one)
            assert status == 400 and body["error"]["message"] == "The request is no HTTP/1.1."
        else:
            one.shutdown(socket.SHUT_WR)
            assert is_closed(one)
    assert server.get("/health").status_code == 200
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


def test_an_answer_that_has_begun_is_not_answered_again(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with connect(server, HEADERS + b"\r\n" + HEADERS + b"\r\n" + b"\0garbage\r\n\r\n") as one:
        assert is_closed(one)
    assert server.get("/health").status_code == 200
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


@pytest.mark.parametrize("path", ["/" + "x" * 5000, "/a%0Ab", "/v1/models/" + "y" * 5000, "/%F0%9F%98%80"])
def test_a_path_that_is_not_there_is_a_sentence(server: Running, path: str) -> None:
    with connect(server, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()) as one:
        status, body = answer_to(one)
    message = body["error"]["message"]
    assert status == 404 and len(message) < 300 and "\n" not in message and message.endswith(".")
