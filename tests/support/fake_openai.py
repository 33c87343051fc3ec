"""A server that speaks OpenAI's API from a script: each answer is bytes, sent in the pieces the test has cut.

Knows sockets and threads; it computes nothing and keeps what it was asked.
"""

import json
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Step = bytes | Callable[["Handler"], None]  # a piece of a body, or what happens instead


@dataclass
class Asked:
    """One request."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Any


@dataclass
class Scripted:
    """One response."""

    steps: Iterable[Step]
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "text/event-stream"})


class FakeOpenAI:
    """Answers POSTs with what was scripted, in that order, and GET /v1/models with `models`, or a script for it."""

    def __init__(self, models: Iterable[str | dict[str, Any]] = ("fake-1b",), port: int = 0):
        self.models: list[dict[str, Any]] = [{"id": m} if isinstance(m, str) else m for m in models]
        self.models_script: Scripted | None = None
        self.script: deque[Scripted] = deque()
        self.asked: list[Asked] = []
        self.closed = threading.Event()  # a client closed its connection before the answer was whole
        self._server = _Server(("127.0.0.1", port), type("_", (Handler,), {"fake": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(30)

    def says(self, *steps: Step, status: int = 200, **headers: str) -> None:
        """Script the next answer; `headers` with _ for -."""
        kind = "text/event-stream" if status == 200 else "application/json"
        self.script.append(
            Scripted(steps, status, {"Content-Type": kind} | {k.replace("_", "-"): v for k, v in headers.items()})
        )

    @property
    def posted(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.method == "POST"]


class _Server(ThreadingHTTPServer):
    """One that says nothing of clients that have left, as they should, and all else that a thread raises."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    fake: FakeOpenAI
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._note(None)
        listed = json.dumps({"object": "list", "data": self.fake.models}).encode()
        default = Scripted([listed], headers={"Content-Type": "application/json"})
        self._send(self.fake.models_script or default)

    def do_POST(self) -> None:
        self._note(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._send(self.fake.script.popleft() if self.fake.script else Scripted([b"{}"], 500, {}))

    def _note(self, body: Any) -> None:
        self.fake.asked.append(Asked(self.command, self.path, dict(self.headers), body))

    def _send(self, scripted: Scripted) -> None:
        self.send_response(scripted.status)
        for name, value in scripted.headers.items():
            self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for step in scripted.steps:
            if callable(step):
                step(self)
                if self.close_connection:
                    return
            elif step:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(step), step))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: Any) -> None: ...


def die(handler: Handler) -> None:
    """The server is gone in the middle of its answer."""
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def wait_for_the_client_to_leave(handler: Handler) -> None:
    """Say nothing more until the client has closed the connection."""
    handler.close_connection = True
    with suppress(ConnectionError):
        assert handler.connection.recv(1) == b""
    handler.fake.closed.set()


def wait_for(event: threading.Event) -> Callable[[Handler], None]:
    """Go on when the test says so."""

    def step(handler: Handler) -> None:
        assert event.wait(60)

    return step


def event(value: Any) -> bytes:
    """One server-sent event, in UTF-8 as most servers write JSON."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def delta(text: str | None, finish: str | None = None, **more: Any) -> bytes:
    """One chunk of a chat's answer."""
    message = {"content": text} if text is not None else {}
    return event(
        {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": message, "finish_reason": finish}]} | more
    )


def text(text: str, finish: str | None = None) -> bytes:
    """One chunk of a completion."""
    return event({"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": finish}]})


def usage(prompt: int, output: int, cached: int | None = None) -> bytes:
    """The last chunk, with the numbers of tokens."""
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    numbers = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    return event({"object": "chat.completion.chunk", "choices": [], "usage": numbers | details})


DONE = b"data: [DONE]\n\n"


def answer(*pieces: str, finish: str = "stop", prompt: int = 5, cached: int | None = None) -> list[bytes]:
    """A whole answer to a chat, a token a piece."""
    begin = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
    return [begin, *map(delta, pieces), delta(None, finish), usage(prompt, len(pieces), cached), DONE]
