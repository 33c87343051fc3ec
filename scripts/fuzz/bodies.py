"""Odd requests to a real server: what is neither an answer nor a refusal with a sentence is printed, to be seen again.

    python scripts/fuzz/bodies.py --seconds 60 --seed 1

A tiny random model is served on a port of its own. Right is 2xx, or 4xx with the error object of OpenAI and a sentence
in it, within 10 seconds and 1 GB; no traceback in the log; and a known question still has its answer in between. The
exit code is 1 if there was anything else. `--case 1234` makes one case alone, and shows it.
"""

import json
import logging
import random
import re
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "fuzz"), str(ROOT / "tests" / "support")]

import common  # noqa: E402
from common import change_bytes, changed, no_sentence  # noqa: E402

SLOWEST = 10.0  # seconds for one case
OFTEN = 20  # cases between two known questions
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "the cat"}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {}}}},
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
KNOWN = {"prompt": "the cat", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HI}),
    (CHAT, {"messages": HI, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "n": 2}),
    (CHAT, {"messages": [{"role": "system", "content": [{"type": "text", "text": "a"}]}, *HI], "top_logprobs": 3}),
    (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True}),
    (CHAT, {"messages": HI, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}),
    (CHAT, {"messages": [*HI, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                         {"role": "tool", "tool_call_id": "call_1", "content": "5"}]}),
    (CHAT, {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "strict": True, "schema": {"type": "object", "properties": {"a": {"enum": ["b", 1]}}}}}}),
    (CHAT, {"messages": HI, "response_format": {"type": "json_object"}, "max_completion_tokens": 3}),
    (CHAT, {"messages": HI, "chat_template_kwargs": {"a": 1}, "continue_final_message": True,
            "add_generation_prompt": False, "metadata": {"a": "b"}, "user": "u", "modalities": ["text"]}),
    (TEXT, {"prompt": "the"}),
    (TEXT, {"prompt": ["the", "cat"], "n": 2, "echo": True, "logprobs": 2, "stream": True, "seed": 5}),
    (TEXT, {"prompt": [5, 6, 7], "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "typical_p": 0.9}),
    (TEXT, {"prompt": [[5, 6], [7]], "repetition_penalty": 1.1, "frequency_penalty": 1, "presence_penalty": -1}),
    (TEXT, {"prompt": "a", "logit_bias": {"5": 1.5}, "allowed_token_ids": [5, 6], "min_tokens": 2, "bad_words": ["x"]}),
    (TEXT, {"prompt": "a", "stop": ["x", "yz"], "stop_token_ids": [7], "include_stop_str_in_output": True}),
    (TEXT, {"prompt": "a", "guided_choice": ["yes", "no"]}),
    (TEXT, {"prompt": "a", "guided_regex": "[a-c]{2}", "skip_special_tokens": False, "ignore_eos": False}),
    (TEXT, {"prompt": "a", "guided_json": {"type": "integer"}, "priority": 3, "add_special_tokens": False}),
    (TEXT, {"prompt": "a", "guided_grammar": 'start: "a" | "b"', "top_n_sigma": 1.0}),
    (TEXT, {"prompt": "a", "structured_outputs": {"json": {"type": "boolean"}}}),
    ("/v1/embeddings", {"input": ["the", "cat"], "encoding_format": "base64"}),
    ("/v1/embeddings", {"input": [1, 2, 3], "user": "u"}),
    ("/tokenize", {"prompt": "the cat", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": HI, "tools": [TOOL], "add_generation_prompt": False}),
    ("/detokenize", {"tokens": [1, 2, 256], "skip_special_tokens": True}),
    ("/apply-template", {"messages": HI, "chat_template_kwargs": {"x": None}}),
]  # fmt: skip
PATHS = ["/v1/models", "/v1/models/tiny", "/tokenizer_info", "/health", "/ready", "/metrics", "/stats", "/inspect", "/"]
ODD_PATHS = [
    *("/v1/models/%00", "/v1/models/..%2f..%2fetc%2fpasswd", "/../../etc/passwd", "//", "/%ff%fe", "/v1/models/a b"),
    *("/v1/models/" + "x" * 5000, "/v1/models/a%0Ab", "/a%0Ab", "/%E2%80%A8", "/v1/models/%F0%9F%98%80", "*"),
    *("/inspect?model=%ud800", "/inspect?model=/etc/passwd", "/inspect?model=..", "/inspect?model=%00", "http://x/y"),
    *("/tokenizer_info?model=&model=tiny", "/tokenizer_info?model=" + "y" * 5000, "/stats?" + "a=b&" * 2000, "/?\\"),
]
METHODS = ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "post", "X" * 300, "PRI"]
TYPES = [
    *("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/json;;"),
    *("application/json; charset=utf-16", "APPLICATION/JSON", "application/json, text/plain", "\xff", "json"),
]
HEADERS = [
    *("Expect: 100-continue", "Authorization: Bearer \xff", "Authorization: " + "x" * 9000, "Accept: nothing/at-all"),
    *(
        "Host: ",
        "Host: a, b",
        "Cookie: " + "a=b; " * 3000,
        "X-a: " + "x" * 40_000,
        "Upgrade: websocket",
        "Upgrade: h2c",
    ),
    *("Origin: null", "Range: bytes=0-", "Content-Encoding: gzip", "Transfer-Encoding: gzip", "Connection: upgrade"),
    *("Content-Length: -1", "Content-Length: 99999999999999999999", "Content-Length: 5, 5", "X\0y: z", ": x", "x"),
]
RAW = [
    b"", b"\r\n", b"\0" * 50, b"GET", b"GET / HTTP/9.9\r\n\r\n", b"GET /\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{",
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n1\r\n{\r\n0\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\nGARBAGE",
    b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 9000,
]  # fmt: skip


class Request(NamedTuple):
    """What is sent, in pieces; `is_http` if it is a whole request, which has a right to an answer in JSON."""

    pieces: list[bytes]
    is_http: bool
    method: str

    def __str__(self) -> str:
        data = b"".join(self.pieces)
        return f"{len(data)} bytes: {data[:1500]!r}"


class Answer(NamedTuple):
    status: int | None  # None where the connection was closed without one
    kind: str
    body: bytes


def request(rng: random.Random) -> Request:
    """A request that is odd in one or two ways."""
    if rng.random() < 0.06:
        raw = rng.choice(RAW)
        return Request([change_bytes(raw, rng, len(raw)) if raw and rng.random() < 0.5 else raw], False, "GET")
    if rng.random() < 0.12:
        path = rng.choice(PATHS if rng.random() < 0.4 else ODD_PATHS)
        return _sent(rng, rng.choice(METHODS) if rng.random() < 0.5 else "GET", path, b"")
    path, body = rng.choice(BODIES)
    if path in (CHAT, TEXT) and "max_completion_tokens" not in body:
        body = {"max_tokens": 4, **body}
    method = rng.choice(METHODS) if rng.random() < 0.03 else "POST"
    if rng.random() < 0.03:
        path = rng.choice([path + "/", "/" + path, path.upper(), path + "?model=x&stream=1", path + "/x", path + "#a"])
    return _sent(rng, method, path, _body(rng, body))


def _body(rng: random.Random, body: dict[str, Any]) -> bytes:
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        wild = changed(body, rng)
        if not isinstance(wild, dict):
            return json.dumps(wild).encode()
        body = wild
    keys = list(body) or ["messages"]
    key = rng.choice(keys)
    match rng.randrange(16):
        case 0:  # a field that nobody knows, or another's
            body = {
                **body,
                rng.choice(["x", "", "\ud800", "k" * 9000, "__class__", "functions", "beam"]): rng.choice(
                    [None, 1, {}]
                ),
            }
        case 1:
            body = {**body, key: None}
        case 2:
            value = body.get(key)
            many = value if isinstance(value, list) and value else [value]
            size = len(json.dumps(many))
            body = {**body, key: many * min(rng.choice((10, 1000, 100_000)), max(1, 3_000_000 // size))}
        case 3:  # the same key twice
            return json.dumps({key: rng.choice(common.ODD)})[:-1].encode() + b", " + json.dumps(body).encode()[1:]
        case 4:
            deep = rng.choice(("[", '{"a":', '[{"a":[')) * rng.choice((50, 250, 1000, 100_000))
            return json.dumps({**body, key: "DEEP"}).encode().replace(b'"DEEP"', deep.encode() + b"1")
        case 5:
            n = rng.choice((50, 120, 190, 250, 1000))
            return json.dumps({**body, key: "DEEP"}).encode().replace(b'"DEEP"', b"[" * n + b"1" + b"]" * n)
        case 6:
            return (
                rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b" " * 99, b"[", b"/**/"]) + json.dumps(body).encode()
            )
        case 7:
            data = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
            return change_bytes(data, rng, len(data))
        case 8:  # letters that are no UTF-8, or half a pair
            return (
                json.dumps(body)
                .encode()
                .replace(b"the", rng.choice((b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\\u0000")))
            )
        case 9:
            number = rng.choice(
                (b"1e400", b"-1e999", b"1" * 5000, b"0.1" * 3, b"NaN", b"-Infinity", b"1E-9999", b"-0", b"01")
            )
            return json.dumps({**body, key: "NUMBER"}).encode().replace(b'"NUMBER"', number)
        case 10:
            word = rng.choice(("the cat ", "é👍", "\u2028", "<|eos|>", "1234567890", "\0"))
            return json.dumps(_with_text(body, word * rng.choice((30, 3000, 200_000)))).encode()
        case 11:
            return rng.choice((b"", b"null", b"[]", b'"x"', b"5", b"{}", b"{", b"}", json.dumps(body).encode() * 2))
    return json.dumps(body).encode("utf-8", "surrogatepass")


def _with_text(value: Any, text: str) -> Any:
    """The value with its first text, which is no role or such, in place of this one."""
    for container, key in common.places(copy := json.loads(json.dumps(value))):
        if container[key] in ("the cat", "the", "a", "cat"):
            container[key] = text
            break
    return copy


def _sent(rng: random.Random, method: str, path: str, body: bytes) -> Request:
    lines, is_http = [f"{method} {path} HTTP/1.1"], " " not in path and path.isascii() and "\\" not in path
    if rng.random() < 0.97:
        lines.append("Host: 127.0.0.1")
    lines.append("Connection: close")
    lines.append(f"Content-Type: {'application/json' if rng.random() < 0.96 else rng.choice(TYPES)}")
    if rng.random() < 0.05:
        lines.append(rng.choice(HEADERS))
        is_http = False  # many of them are none
    pieces = [body]
    if rng.random() < 0.1:
        sizes = [rng.choice((1, 7, 1000)) for _ in range(20)]
        pieces = [body[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))] + [body[sum(sizes) :]]
        pieces = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece] + [b"0\r\n\r\n"]
        lines.append("Transfer-Encoding: chunked")
    elif body or rng.random() < 0.5:
        lines.append(f"Content-Length: {len(body)}")
    if "Host: 127.0.0.1" not in lines or method not in ("GET", "POST", "PUT", "DELETE", "PATCH"):
        is_http = False
    return Request(["\r\n".join([*lines, "", ""]).encode("latin-1"), *pieces], is_http, method)


def ask(port: int, sent: Request) -> Answer:
    """Send it, and read what comes until the connection is closed; TimeoutError after SLOWEST."""
    with socket.create_connection(("127.0.0.1", port), timeout=SLOWEST) as one:
        try:
            for piece in sent.pieces:
                one.sendall(piece)
            if not sent.is_http:
                one.shutdown(socket.SHUT_WR)  # what is half a request stays one
            response = HTTPResponse(one, method=sent.method)
            response.begin()
            return Answer(response.status, response.headers.get_content_type(), response.read())
        except TimeoutError:
            raise
        except (OSError, HTTPException):  # closed in the middle, which a refusal may be
            return Answer(None, "", b"")


class Log(logging.Handler):
    """Keeps what must not be in a log."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.faults: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info or "Traceback" in text or record.levelno >= logging.ERROR:
            self.faults.append(logging.Formatter().format(record)[-1500:])


class Fuzzer:
    noun = "neither an answer nor a sentence"

    def __init__(self, seed: int) -> None:
        import checkpoints
        from servers import running

        self._seed, self._log, self._cases = seed, Log(), 0
        logging.getLogger().addHandler(self._log)
        self._stack = ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-bodies-")))
        checkpoints.write_folder(folder / "tiny", checkpoints.CONFIGS["llama"])
        options: dict[str, Any] = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 8, "kv_cache_memory": 32 << 20}
        server = self._stack.enter_context(running({"tiny": folder / "tiny"}, app={"tool_format": "json"}, **options))
        self._port = int(server.url.rpartition(":")[2])
        for path, body in BODIES:  # kernels are compiled, processes are started
            server.post(path, {**body, "max_tokens": 4} if path in (CHAT, TEXT) else body)
        self._known = self._known_answer()

    def describe(self, number: int) -> str:
        return str(request(random.Random(f"{self._seed} {number}")))

    def fault(self, number: int) -> str:
        sent = request(random.Random(f"{self._seed} {number}"))
        started = time.monotonic()
        try:
            wrong = judged(sent, ask(self._port, sent))
        except TimeoutError:
            wrong = f"no answer for {SLOWEST:g} s"
        if not wrong and (took := time.monotonic() - started) > SLOWEST:
            wrong = f"took {took:.1f} s"
        if self._log.faults:
            wrong += f" the log says, of this case or of one before: {self._log.faults.pop(0)}"
            self._log.faults.clear()
        self._cases += 1
        if not wrong and self._cases % OFTEN == 0 and (known := self._known_answer()) != self._known:
            wrong = f"a known question has another answer afterwards: {known!r:.500}"
        return wrong

    def _known_answer(self) -> Any:
        data = json.dumps(KNOWN).encode()
        head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(data)}\r\n\r\n"
        try:
            answer = ask(self._port, Request([head.encode(), data], True, "POST"))
            return json.loads(answer.body)["choices"][0]["text"]
        except (TimeoutError, ValueError, KeyError) as error:
            return repr(error)


def judged(sent: Request, answer: Answer) -> str:
    """What is wrong with an answer, empty where nothing is."""
    given = b"".join(sent.pieces).decode("latin-1")
    if answer.status is None:
        return "the connection is closed without an answer" if sent.is_http else ""
    if answer.status >= 500:
        return f"{answer.status}: {answer.body[:500]!r}"
    if answer.kind == "text/event-stream":
        for data in re.findall(rb"^data: (\{.*)$", answer.body, re.MULTILINE):
            if (event := json.loads(data)).get("error") and (wrong := _error(event, given)):
                return wrong
        return "" if b"[DONE]" in answer.body or b'"error"' in answer.body else "a stream without an end"
    if answer.status < 300 or sent.method == "HEAD":
        if answer.kind == "application/json" and sent.method != "HEAD":
            json.loads(answer.body)
        return ""
    if answer.status < 400:
        return f"{answer.status}, which goes elsewhere"
    if answer.kind != "application/json":
        return f"{answer.status} {answer.kind}: {answer.body[:300]!r}"
    return _error(json.loads(answer.body), given)


def _error(body: Any, given: str) -> str:
    error = body.get("error")
    if not isinstance(error, dict) or error.keys() != {"message", "type", "param", "code"}:
        return f"no error object: {body!r:.300}"
    if error["type"] == "server_error":
        return f"a mistake of the server: {error}"
    return no_sentence(error["message"], given)


if __name__ == "__main__":
    sys.exit(common.main(__doc__, Fuzzer))
