"""Connections that ask for nothing: they are closed after a while, make room for others, and fill no log."""

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path

import pytest
from servers import Running, running

from tinyserve.server import connections
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
