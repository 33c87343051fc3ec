"""What strangers send to stop a server, and how long a stream beside it waits for its tokens meanwhile.

Knows HTTP and tinyserve's paths; which waits are too long, who asks decides.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from typing import Any, NamedTuple

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HALF_OPEN = 200  # connections
PATIENCE = 120  # seconds for the answer to an attack


class Attack(NamedTuple):
    """Requests that are sent at once; `half_open`: connections that never finish their headers, kept meanwhile."""

    requests: list[tuple[str, Any]]
    half_open: int = 0


def _guided(**structure: Any) -> tuple[str, Any]:
    return CHAT, {"messages": [{"role": "user", "content": "the"}], "max_tokens": 4, "temperature": 0, **structure}


def _chain(links: int) -> dict[str, Any]:
    defs = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(links)}
    return {"$defs": {**defs, f"d{links}": {"type": "string"}}, "$ref": "#/$defs/d0"}


def _rules(links: int) -> str:
    return "start: r0\n" + "\n".join(f'r{i}: "x" r{i + 1}' for i in range(links)) + f'\nr{links}: "y"'


def _biased(count: int) -> tuple[str, Any]:
    return TEXT, {"prompt": "a", "logit_bias": dict.fromkeys(range(count), 1)}


def attacks() -> dict[str, Attack]:
    """Each by what it is."""
    long = "the cat 12345 " * 550_000  # 7.7 MB, of 16 that a body may have
    patterns = {"allOf": [{"type": "string", "pattern": f"a{{{i}}}.*"} for i in range(50)]}
    choices = [_guided(guided_choice=[f"{i} {k}" for k in range(60_000)]) for i in range(8)]
    return {
        "a schema of 4,000 definitions": Attack([_guided(guided_json=_chain(4000))]),
        "a grammar of 4,000 rules": Attack([_guided(guided_grammar=_rules(4000))]),
        "50 patterns at once": Attack([_guided(guided_json=patterns)]),
        f"{HALF_OPEN} half-open connections": Attack([("/health", None)] * 20, HALF_OPEN),
        "a long prompt": Attack([(TEXT, {"prompt": long, "max_tokens": 1})]),
        "a long text to tokenize": Attack([("/tokenize", {"prompt": long})]),
        "1 MB to tokenize": Attack([("/tokenize", {"prompt": long[: 1 << 20]})]),
        "a long text to embed": Attack([("/v1/embeddings", {"input": [long]})]),
        "eight choices of 60,000": Attack(choices),
        "1,000,000 unknown fields": Attack([(TEXT, {f"k{i}": 1 for i in range(1_000_000)})]),
        "200,000 unknown fields": Attack([(TEXT, {f"k{i}": 1 for i in range(200_000)})]),
        "200,000 messages": Attack([(CHAT, {"messages": [{"role": "user", "content": "x"}] * 200_000})]),
        "60,000 messages": Attack([(CHAT, {"messages": [{"role": "user", "content": "x"}] * 60_000})]),
        "a logit_bias of 1,000,000": Attack([_biased(1_000_000)]),
        "a logit_bias of 200,000": Attack([_biased(200_000)]),
        "/detokenize of 4,000,000": Attack([("/detokenize", {"tokens": [100] * 4_000_000})]),
        "/detokenize of 250,000": Attack([("/detokenize", {"tokens": [100] * 250_000})]),
    }


def run(port: int, attack: Attack) -> None:
    """Send it, and wait for the answers, whatever they are; bodies are bytes."""
    with ExitStack() as stack:
        for _ in range(attack.half_open):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
            one.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-a: ")
        threads = [threading.Thread(target=_ask, args=(port, *request), daemon=True) for request in attack.requests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _ask(port: int, path: str, body: bytes | None) -> None:
    connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with suppress(OSError, HTTPException):
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request("POST" if body is not None else "GET", path, body, headers)
        connection.getresponse().read()
    connection.close()


class Watch:
    """A stream that is read without end; the longest that it waited for tokens, as `clock` counts."""

    def __init__(self, port: int, clock: Callable[[], float], max_tokens: int):
        self._port, self._clock, self._max_tokens = port, clock, max_tokens
        self._is_over, self._arrived = threading.Event(), threading.Condition()
        self.longest, self.pieces = 0.0, 0
        self.error: Exception | None = None

    @contextmanager
    def reading(self) -> Iterator["Watch"]:
        """Streams follow each other until the block ends, and the last has had a token behind what the block did."""
        thread = threading.Thread(target=self._read, daemon=True)
        thread.start()
        try:
            self.wait()
            yield self
            self.wait()
        finally:
            self._is_over.set()
            thread.join()
        if self.error is not None:
            raise self.error

    def wait(self, pieces: int = 3) -> None:
        """Until so many more pieces of the stream have come."""
        with self._arrived:
            end = self.pieces + pieces
            self._arrived.wait_for(lambda: self.pieces >= end or self.error is not None, PATIENCE)
            assert self.pieces >= end, self.error or "the stream has stopped"

    def begin(self) -> None:
        """Forget what was until now."""
        with self._arrived:
            self.longest = 0.0

    def _read(self) -> None:
        try:
            while not self._is_over.is_set():
                self._one()
        except Exception as error:
            with self._arrived:
                self.error = error
                self._arrived.notify_all()

    def _one(self) -> None:
        options = {"max_tokens": self._max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body = json.dumps({"prompt": "the cat", **options}).encode()
        head = f"POST {TEXT} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE) as one:
            one.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            last = None
            while not self._is_over.is_set() and (data := one.recv(1 << 16)):
                now = self._clock()
                if b"data: {" not in data:
                    continue
                with self._arrived:
                    if last is not None:
                        self.longest = max(self.longest, now - last)
                    self.pieces += 1
                    self._arrived.notify_all()
                last = now


def longest_wait(port: int, attack: Attack, clock: Callable[[], float], max_tokens: int) -> tuple[float, float]:
    """The longest that a stream waits for its tokens on an idle server, and beside an attack."""
    # Before anything is counted: who makes JSON does not read meanwhile.
    bodies = [(path, None if body is None else json.dumps(body).encode()) for path, body in attack.requests]
    watch = Watch(port, clock, max_tokens)
    with watch.reading():
        watch.wait(30)
        idle = watch.longest
        watch.begin()
        run(port, attack._replace(requests=bodies))
    return idle, watch.longest


def processor_clock(pid: int) -> Callable[[], float]:
    """The seconds of the processor that another process has had, on Linux: others that are at work do not count."""
    clock = (~pid << 3) | 2  # CPUCLOCK_SCHED of a process, as clock_getcpuclockid(3) makes it
    return lambda: time.clock_gettime(clock)
