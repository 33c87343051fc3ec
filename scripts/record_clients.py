"""Write tests/data/clients/*.jsonl: the requests that other people's libraries send in their usual calls.

    python scripts/record_clients.py                                        # of every library that is installed here
    python scripts/record_clients.py openai dspy                            # of these
    python scripts/record_clients.py --url http://127.0.0.1:8000 --model smollm2-135m     # ask a server, record nothing

A library's file begins with a line of versions; then comes a line for each request: its call, method, path, headers,
body. Libraries that do not go together are recorded one after another, each in an environment of its own: those that
are not installed are named and left alone. Run it again when they have new versions, and send the requests to the
server (tests/server/test_recorded_clients.py). With --url the libraries themselves ask a server, and each call that
raises is printed. Exits with 1 when a call has failed.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from clients import answers

DATA = Path(__file__).parent.parent / "tests" / "data" / "clients"
HEADERS = ("accept", "content-type", "user-agent")
# A library, and the module that must be there.
LIBRARIES = {
    "openai": "openai",
    "langchain": "langchain_openai",
    "pydantic-ai": "pydantic_ai",
    "instructor": "instructor",
    "llama-index": "llama_index.llms.openai_like",
    "dspy": "dspy",
    "litellm": "litellm",
}
PACKAGES = {
    "openai": ("openai",),
    "langchain": ("langchain-openai", "langchain-core", "openai"),
    "pydantic-ai": ("pydantic-ai-slim", "openai"),
    "instructor": ("instructor", "openai"),
    "llama-index": (
        "llama-index-llms-openai",
        "llama-index-llms-openai-like",
        "llama-index-embeddings-openai",
        "openai",
    ),
    "dspy": ("dspy", "openai"),
    "litellm": ("litellm", "openai"),
}


@dataclass
class Recorder:
    """What was asked, and what the next answers say."""

    call: str = ""
    text: str = answers.TEXT
    requests: list[dict[str, Any]] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"libraries, of {', '.join(LIBRARIES)}")
    parser.add_argument("--out", type=Path, default=DATA, help="the folder, %(default)s")
    parser.add_argument("--url", help="a server to ask instead")
    parser.add_argument("--model", default=answers.MODEL, help="the name of its model")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in LIBRARIES]:
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(LIBRARIES)}")
    failures = 0
    for name in arguments.names or LIBRARIES:
        if not _is_installed(LIBRARIES[name]):
            print(f"{name}: {LIBRARIES[name]} is not installed here; its recordings stay as they are")
            failures += bool(arguments.names)
            continue
        if arguments.url:
            failures += ask(name, arguments.url.rstrip("/"), arguments.model, Recorder())
            continue
        recorder = Recorder()
        with recording(recorder) as url:
            failures += ask(name, url, answers.MODEL, recorder)
        write(name, recorder.requests, arguments.out)
    return 1 if failures else 0


def ask(name: str, url: str, model: str, recorder: Recorder) -> int:
    """Make all calls of a library; returns how many have raised."""
    module = importlib.import_module(f"clients.call_{name.replace('-', '_')}")
    failures = 0
    for call, (text, run) in module.calls(f"{url}/v1", model).items():
        recorder.call, recorder.text = call, text or answers.TEXT
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run()
        except Exception as error:  # of any library, of any kind
            failures += 1
            print(f"{name}: {call}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
    return failures


def write(name: str, requests: list[dict[str, Any]], folder: Path) -> None:
    """The file of a library; a request that is sent a second time is written once."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES[name]}
    lines = [json.dumps({"library": name, "versions": versions, "python": platform.python_version()})]
    lines += [json.dumps(request, ensure_ascii=False) for request in requests]
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = list(dict.fromkeys(lines))
    path.write_text("\n".join(unique) + "\n", encoding="utf-8")
    print(f"{name}: {len(unique) - 1} requests, {path.stat().st_size} bytes")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@contextmanager
def recording(recorder: Recorder) -> Iterator[str]:
    """A server on a free port, which notes what it is asked; its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Mapping[str, Any]) -> None:
            headers = {name: value for name in HEADERS if (value := self.headers.get(name)) is not None}
            request = {"call": recorder.call, "method": self.command, "path": self.path, "headers": headers}
            recorder.requests.append(request | ({"body": body} if self.command == "POST" else {}))
            response = answers.answer(self.path, body, recorder.text)
            if isinstance(response, list):
                return self._send(b"".join(answers.events(response)), "text/event-stream")
            return self._send(json.dumps(response).encode(), "application/json", 200 if response else 404)

        def _send(self, data: bytes, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing: the requests are the log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    # Nothing may reach for OpenAI itself, or tell anybody of these calls.
    os.environ |= {"OPENAI_API_KEY": "none", "ANONYMIZED_TELEMETRY": "false", "DO_NOT_TRACK": "1"}
    os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "DSPY_CACHEDIR": os.devnull, "NO_PROXY": "*"}
    sys.exit(main())
