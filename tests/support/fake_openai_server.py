"""A small OpenAI server whose answers a test writes beforehand: slow ones, broken ones, ones that refuse.

It knows the API's outside and no model. `tests/server/test_page.py` drives the page against it.
"""

import base64
import hashlib
import json
import math
import re
import select
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tinyserve.server.page import page as whole_page


@dataclass
class Token:
    """A token of an answer, its probability, and others with theirs; `raw` where its bytes are no text alone."""

    text: str
    probability: float = 1.0
    others: Mapping[str, float] = field(default_factory=dict)
    raw: bytes | None = None
    shown: str = "content"  # or "reasoning", or "" for a tag between the two

    def entry(self, top: int) -> dict[str, Any]:
        """What the API says of it, with the `top` likeliest tokens."""
        raw = self.raw if self.raw is not None else self.text.encode()
        chosen = {"token": self.text, "logprob": math.log(self.probability), "bytes": list(raw)}
        others = [{"token": t, "logprob": math.log(p), "bytes": list(t.encode())} for t, p in self.others.items()]
        ranked = sorted([chosen, *others], key=lambda entry: -entry["logprob"])
        return chosen | {"top_logprobs": ranked[:top]}


@dataclass
class Comment:
    """A comment of the stream, such as "load smollm2-135m 40/100"."""

    text: str


@dataclass
class Raw:
    """Bytes of the stream as they are, such as a part of an event."""

    data: bytes


@dataclass
class Gate:
    """Where the stream waits until a test opens it, or the client has gone."""

    opened: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)
    client_left: threading.Event = field(default_factory=threading.Event)


@dataclass
class Refusal:
    """An answer that is an error, before anything is streamed."""

    status: int
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Failure:
    """An error in mid-stream."""

    message: str


@dataclass
class Hangup:
    """The connection ends without [DONE]."""


Step = Token | Comment | Raw | Gate | Failure | Hangup
Script = Refusal | Sequence[Step]

PARIS: Script = [
    Token("The", 0.82, {"Paris": 0.13, "France": 0.02}),
    Token(" capital", 0.99, {" city": 0.004}),
    Token(" of", 0.997),
    Token(" France", 0.985, {" the": 0.006}),
    Token(" is", 0.97, {",": 0.02}),
    Token(" Paris", 0.93, {" the": 0.03, " called": 0.01, " a": 0.006}),
    Token(".", 0.9, {",": 0.08}),
]
MODEL = {"id": "smollm2-135m", "object": "model", "created": 0, "owned_by": "tinyserve"}
LOADED: dict[str, Any] = {**MODEL, "max_model_len": 8192, "loaded": True, "dtype": "w8a16", "chat": True}


class FakeServer:
    """Serves on a port of its own until `close`. What it was asked is in `requests`, the oldest first."""

    def __init__(self, port: int = 0):
        self.models: list[dict[str, Any]] = [dict(LOADED)]
        self.scripts: deque[Script] = deque()  # for the next requests; PARIS after that
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.key: str | None = None
        self.models_gate = threading.Event()  # the list of models waits for it
        self.models_gate.set()
        self.inspections: dict[str, dict[str, Any]] = {}
        self.stats: dict[str, Any] = {"models": {}}
        self.prompt_tokens, self.cached_tokens = 37, 0
        self._http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"fake": self}))
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        """Stop listening, as a server that died."""
        self._http.shutdown()
        self._http.server_close()


def content_security_policy(page: str) -> str:
    """The strictest policy that the page works under: its own script, by hash, and its own server."""
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    # HTTP/1.0: a connection for each request, so that a closed server is gone at once.

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/":
            page = whole_page()
            return self._send(
                page.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": content_security_policy(page)}
            )
        if url.path in ("/health", "/ready"):
            return self._json({"status": "ok"})
        if not self._is_allowed():
            return self._refuse(Refusal(401, "This server wants an API key."))
        if url.path == "/v1/models":
            self.fake.models_gate.wait()
            return self._json({"object": "list", "data": self.fake.models})
        if url.path == "/stats":
            return self._json(self.fake.stats)
        if url.path == "/inspect":
            (model,) = parse_qs(url.query)["model"]
            if model in self.fake.inspections:
                return self._json(self.fake.inspections[model])
        return self._refuse(Refusal(404, f"There is nothing at {self.path}."))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            return self._refuse(Refusal(401, "This server wants an API key."))
        self.fake.requests.append((self.path, body))
        script = self.fake.scripts.popleft() if self.fake.scripts else PARIS
        if isinstance(script, Refusal):
            return self._refuse(script)
        return self._stream(body, script)

    def _is_allowed(self) -> bool:
        return self.fake.key is None or self.headers["Authorization"] == f"Bearer {self.fake.key}"

    def _stream(self, body: dict[str, Any], script: Sequence[Step]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in self._events(body, script):
            try:
                self.wfile.write(event)
                self.wfile.flush()
            except OSError:
                return

    def _events(self, body: dict[str, Any], script: Sequence[Step]) -> Iterator[bytes]:
        chunk = _chat_chunk if "messages" in body else _text_chunk
        written = 0
        for step in script:
            match step:
                case Token():
                    written += 1
                    yield _event(chunk(step, body))
                case Comment(text):
                    yield f": {text}\n\n".encode()
                case Raw(data):
                    yield data
                case Gate():
                    if not self._wait(step):
                        return
                case Failure(message):
                    yield _event({"error": {"message": message, "type": "server_error"}})
                    return
                case Hangup():
                    return
        yield _event({"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}]})
        usage = {"prompt_tokens": self.fake.prompt_tokens, "completion_tokens": written}
        details = {"prompt_tokens_details": {"cached_tokens": self.fake.cached_tokens}}
        yield _event({"choices": [], "usage": usage | details})
        yield b"data: [DONE]\n\n"

    def _wait(self, gate: Gate) -> bool:
        """Whether the gate was opened, and not the connection closed."""
        gate.reached.set()
        while not gate.opened.wait(0.02):
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable:  # a client that waits for an answer sends nothing: this is its end
                gate.client_left.set()
                return False
        return True

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), "application/json")

    def _refuse(self, refusal: Refusal) -> None:
        body = {"error": {"message": refusal.message, "type": "error", "param": None, "code": None}}
        self._send(json.dumps(body).encode(), "application/json", refusal.headers, refusal.status)

    def _send(self, body: bytes, kind: str, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Tests need no log."""


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def _chat_chunk(token: Token, body: dict[str, Any]) -> dict[str, Any]:
    delta = {token.shown: token.text} if token.shown else {}
    choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None}
    if body.get("logprobs"):
        choice["logprobs"] = {"content": [token.entry(body["top_logprobs"])]}
    return {"choices": [choice]}


def _text_chunk(token: Token, body: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "text": token.text, "finish_reason": None}
    if body.get("logprobs"):
        entry = token.entry(body["logprobs"])
        choice["logprobs"] = {
            "tokens": [entry["token"]],
            "token_logprobs": [entry["logprob"]],
            "top_logprobs": [{other["token"]: other["logprob"] for other in entry["top_logprobs"]}],
        }
    return {"choices": [choice]}
