"""What the handlers of one server share, and how a request's body is read."""

import asyncio
from collections.abc import AsyncIterator, Container, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tinyserve.async_engine import AsyncEngine
from tinyserve.progress import Progress
from tinyserve.server.errors import NO_ALIASES, ApiError, told
from tinyserve.server.metrics import ServerMetrics
from tinyserve.server.outbox import dumps, gone
from tinyserve.server.pool import ModelPool, ServedModel
from tinyserve.server.protocol import B, parse

T = TypeVar("T")

BODY_TIMEOUT = 30.0  # seconds for a body to arrive


@dataclass
class State:
    """One server's models and counts; `is_ready` once the first model is in memory."""

    pool: ModelPool
    metrics: ServerMetrics
    tool_format: str | None = None  # how calls are written, where chat templates do not tell
    is_ready: bool = False
    is_draining: bool = False  # what runs is finished, and nothing new begun
    failure: str | None = None  # why the first model could not be loaded

    @asynccontextmanager
    async def engine(
        self,
        model: ServedModel,
        answers: int = 1,
        progress: Progress | None = None,
        fields: Container[str] = (),
        aliases: Mapping[str, str] = NO_ALIASES,
    ) -> AsyncIterator[AsyncEngine]:
        """A model's engine, as the pool has it; errors within name the client's field, as `told` has it."""
        with told(fields, aliases):
            async with self.pool.use(model, answers, progress) as engine:
                yield engine


class Json(Response):
    """JSON of whatever the engine says; floats that are no numbers are a mistake of ours."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


def state_of(request: Request) -> State:
    state: State = request.app.state.server
    return state


async def read(request: Request, kind: type[B]) -> B:
    """The body, checked; raises ApiError for what is none, or comes too slowly."""
    given = request.headers.get("content-type", "")
    if given.split(";")[0].strip().lower() != "application/json":
        # A page of somebody else's may send a browser's user's forms here, but not JSON.
        raise ApiError(415, f"The content type is {given!r:.80}; it must be application/json.", code="content_type")
    try:
        data = await asyncio.wait_for(request.body(), BODY_TIMEOUT)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {BODY_TIMEOUT:.0f} s.") from None
    return parse(kind, data)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away before."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(gone(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
