"""A server in a thread of its own, on a port that is free, for tests that speak to it as clients do."""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import uvicorn
from starlette.applications import Starlette

from tinyserve.async_engine import AsyncEngine
from tinyserve.engine_options import EngineOptions
from tinyserve.server.app import create_app
from tinyserve.server.connections import limit_connections
from tinyserve.server.guards import MAX_HEADERS, Admission
from tinyserve.server.pool import ModelPool
from tinyserve.server.state import State


@dataclass
class Running:
    """A server that answers at `url`."""

    url: str
    app: Starlette

    @property
    def state(self) -> State:
        state: State = self.app.state.server
        return state

    @property
    def engine(self) -> AsyncEngine:
        """The first model's."""
        engine = self.state.pool.default.engine
        assert engine is not None
        return engine

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, trust_env=False, **options)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, headers=headers)

    def get(self, path: str, **headers: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path, headers=headers)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


@contextmanager
def running(
    models: Mapping[str, str | Path],
    max_queue: int = 64,
    memory: int = 8 << 30,
    app: Mapping[str, Any] | None = None,
    admission: Admission | None = None,
    connections: int = 1000,
    **options: Any,
) -> Iterator[Running]:
    """Serve models with these options of LLM; `app` has those of `create_app`."""
    pool = ModelPool(
        {name: str(source) for name, source in models.items()}, EngineOptions.of(options), memory, max_queue
    )
    application = create_app(pool, admission, **(app or {}))
    protocol = limit_connections(connections)
    config = uvicorn.Config(
        application, host="127.0.0.1", port=0, http=protocol, loop="asyncio", ws="none", log_config=None, lifespan="on",
        h11_max_incomplete_event_size=2 * MAX_HEADERS, timeout_graceful_shutdown=5,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    one = Running(f"http://127.0.0.1:{port}", application)
    try:
        one.post("/tokenize", {"prompt": "a"})  # waits for the first model
        yield one
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
