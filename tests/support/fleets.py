"""A fleet as others see it: a front in a process of its own, its log, and the processes of its replicas."""

import re
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
from processes import descendants


class Fleet:
    """A front in a process of its own, which has said its address; `host` is the process below which replicas are."""

    def __init__(self, process: "subprocess.Popen[bytes]", host: int | None = None):
        self.process, self._host = process, host or process.pid
        assert process.stderr is not None
        self.log: list[str] = []
        self.url = ""
        for line in iter(process.stderr.readline, b""):
            self.log.append(line.decode())
            if said := re.match(r"http://\S+", self.log[-1]):
                self.url = said[0]
                break
        assert self.url, self.log
        threading.Thread(target=self._read, args=(process.stderr,), daemon=True).start()

    def _read(self, stream: Any) -> None:
        with suppress(ValueError, OSError):
            for line in iter(stream.readline, b""):
                self.log.append(line.decode())

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=180, trust_env=False)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, headers=headers)

    def get(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path)

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, "".join(self.log[-40:])
            time.sleep(0.1)

    def until_ready(self, replicas: int = 2) -> "Fleet":
        self.until(lambda: len(self.replicas()) == replicas and self.get("/ready").status_code == 200)
        return self

    def replicas(self) -> list[int]:
        """The processes of the replicas."""
        return [pid for pid in descendants(self._host) if title(pid).startswith("ray::ServeReplica")]

    def metric(self, name: str) -> dict[str, float]:
        """A metric by the replica's label, or "" without one."""
        found: dict[str, float] = {}
        for line in self.get("/metrics").text.splitlines():
            if line.split("{")[0].split(" ")[0] == name:
                label = re.search(r'replica="([^"]*)"', line)
                found[label[1] if label else ""] = float(line.split()[-1])
        return found


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
