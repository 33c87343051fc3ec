"""A Hugging Face Hub on the loopback interface, real enough for the real client. It knows no tinyserve.

    with FakeHub(root) as hub:                      # root/owner/name/ holds a repository's files
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}

Every 40-digit commit, "main", and what `branches` adds are revisions of the same files. Attributes may change
while it runs: `gated` and `private` hold repository names that want `token`, `status` answers everything with
an error, `dies_after` bytes the network is gone, until it is None again. `requests` records what was asked.
"""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from loopback import QuietHandler

COMMIT = re.compile(r"[0-9a-f]{40}")
LARGE = (".safetensors", ".gguf", ".bin", ".pt")  # what a Hub keeps in Git LFS


@dataclass(frozen=True)
class Request:
    """One request as it arrived, and the status it got."""

    method: str
    path: str
    headers: dict[str, str]
    status: int


@dataclass
class FakeHub:
    """The server; a context manager. `url` is what HF_ENDPOINT wants."""

    root: Path
    token: str = "hf_fake"
    branches: set[str] = field(default_factory=lambda: {"main"})
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    status: int | None = None
    dies_after: int | None = None  # bytes of file bodies from now on; then every connection is dropped
    cut_once: int | None = None  # the next longer body ends after so many bytes, and all is well again
    storage: str | None = None  # where large files are redirected to: the url of another FakeHub
    stalls: bool = False  # accepts connections and answers nothing
    ignores_range: bool = False
    wrong_sizes: bool = False  # the listing promises one byte more than there is
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> "FakeHub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.closing = threading.Event()
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def commit(self) -> str:
        """The commit behind every branch."""
        return hashlib.sha1(b"fake").hexdigest()

    def served(self, suffix: str = "", method: str = "GET") -> list[Request]:
        """The requests whose path ends in `suffix`."""
        return [r for r in self.requests if r.method == method and r.path.endswith(suffix)]

    def files(self, repo: str) -> dict[str, Path] | None:
        """A repository's files by their names in it, None if there is no such repository."""
        folder = self.root / repo
        if not folder.is_dir():
            return None
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path for path in paths}

    def entry(self, name: str, path: Path) -> dict[str, Any]:
        """What the Hub tells about a file: size, git's id, and sha256 where it is large."""
        data = path.read_bytes()
        size = len(data) + self.wrong_sizes
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": git}
        if name.endswith(LARGE):
            entry["lfs"] = {"size": size, "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
        return entry


class _Handler(QuietHandler):
    hub: FakeHub

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def _route(self) -> None:
        hub = self.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.stalls:
            hub.closing.wait(60)
            self.close_connection = True
            return
        if hub.dies_after is not None and hub.dies_after <= 0:
            self._drop()
            return
        path = unquote(urlsplit(self.path).path)
        if hub.status is not None:
            self._fail(hub.status, None)
        elif api := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/(.+))?", path):
            self._api(api[1], api[2] or "revision", api[3] or "main", body)
        elif resolve := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", path):
            self._resolve(*resolve.groups())
        else:
            self._fail(404, None)

    def _commit(self, revision: str) -> str | None:
        if COMMIT.fullmatch(revision):
            return revision
        return self.hub.commit if revision in self.hub.branches else None

    def _may_read(self, repo: str, *, listing: bool) -> bool:
        """The Hub hides private repositories, and shows the listing of a gated one to everybody."""
        sent = self.headers.get("Authorization")
        if sent == f"Bearer {self.hub.token}":
            return True
        if sent is not None and "invalid" in sent:
            self._fail(401, None, "Invalid credentials in Authorization header")
            return False
        if repo in self.hub.private:
            self._fail(401, "RepoNotFound", "Repository not found")
            return False
        if repo in self.hub.gated and not listing:
            self._fail(403 if sent else 401, "GatedRepo", "Access to this model is restricted")
            return False
        return True

    def _api(self, repo: str, what: str, revision: str, body: bytes) -> None:
        files, commit = self.hub.files(repo), self._commit(revision)
        if files is None:
            self._fail(404, "RepoNotFound", "Repository not found")
        elif commit is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif self._may_read(repo, listing=True):
            entries = [self.hub.entry(name, path) for name, path in files.items()]
            if what == "revision":
                blobs = "blobs" in parse_qs(urlsplit(self.path).query)
                siblings = entries if blobs else [{"rfilename": entry["rfilename"]} for entry in entries]
                gated = "manual" if repo in self.hub.gated else False
                self._json({"id": repo, "modelId": repo, "sha": commit, "gated": gated, "siblings": siblings})
                return
            tree = []
            for entry in entries:
                item = {
                    "type": "file",
                    "path": entry["rfilename"],
                    "size": entry["size"],
                    "oid": entry["blobId"],
                }
                if "lfs" in entry:
                    item["lfs"] = entry["lfs"] | {"oid": entry["lfs"]["sha256"]}
                tree.append(item)
            if what == "paths-info":
                wanted = json.loads(body)["paths"]
                tree = [item for item in tree if item["path"] in wanted]
            self._json(tree)

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        files, commit = self.hub.files(repo), self._commit(revision)
        if files is None:
            self._fail(404, "RepoNotFound", "Repository not found")
        elif commit is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif not self._may_read(repo, listing=False):
            return
        elif name not in files:
            self._fail(404, "EntryNotFound", "Entry not found", commit=commit)
        else:
            self._send_file(self.hub.entry(name, files[name]), files[name].read_bytes(), commit)

    def _send_file(self, entry: dict[str, Any], data: bytes, commit: str) -> None:
        etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(entry["size"])}
            if self.hub.storage is not None:
                self._answer(302, headers | {"Location": self.hub.storage + self.path})
                return
        start = 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted and not self.hub.ignores_range:
            start = int(wanted[1])
            if start >= len(data):
                self._answer(416, {"Content-Range": f"bytes */{len(data)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._answer(206 if "Content-Range" in headers else 200, headers, data[start:])

    def _json(self, value: object) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _fail(self, status: int, code: str | None, message: str = "", commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        body = json.dumps({"error": message}).encode()
        self._answer(status, {key: value for key, value in headers.items() if value}, body)

    def _answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.hub.requests.append(Request(self.command, urlsplit(self.path).path, dict(self.headers), status))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        budget = self.hub.dies_after
        if budget is not None and "/resolve/" in self.path:
            self.hub.dies_after = max(0, budget - len(body))
            if len(body) > budget:
                self.wfile.write(body[:budget])
                self._drop()
                return
        cut = self.hub.cut_once
        if cut is not None and len(body) > cut and "/resolve/" in self.path:
            self.hub.cut_once = None
            self.wfile.write(body[:cut])
            self._drop()
            return
        self.wfile.write(body)

    def _drop(self) -> None:
        """Close the connection as a network does that goes away; what was written arrives first."""
        self.wfile.flush()
        time.sleep(0.05)
        self.close_connection = True
