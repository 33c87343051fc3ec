"""What every handler uses: the server's state, a checked body, an engine, JSON, and an end when the client leaves."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tinyserve.async_engine import AsyncEngine
from tinyserve.progress import Progress
from tinyserve.server.aliases import aliases_of
from tinyserve.server.errors import NO_ALIASES, ApiError, error_context
from tinyserve.server.metrics import ServerMetrics
from tinyserve.server.pool import ModelPool, ServedModel
from tinyserve.server.protocol import B, Body, parse
from tinyserve.server.sse import dumps, wait_disconnect

T = TypeVar("T")

logger = logging.getLogger("tinyserve.server")

IGNORED = "tinyserve.ignored"  # in a request's scope: the fields of its body that were passed over
ANSWER = "tinyserve.answer"  # in a request's scope: an answer's number and time, where somebody has chosen them before
BODY_TIMEOUT = 30.0  # seconds
MAX_VALUES = (
    1 << 18
)  # in a body, or as many commas in its texts: to make so many objects takes the loop a tenth of a second
LOOP_VALUES = 1 << 13  # that are parsed in the loop, in a few milliseconds


@dataclass
class State:
    """One server's models and metrics; `is_ready` once the first model is in memory."""

    pool: ModelPool
    metrics: ServerMetrics
    tool_format: str | None = None  # for models whose chat templates do not imply one (`tools.FORMATS`)
    is_ready: bool = False
    is_draining: bool = False  # running requests are finished, new ones refused
    failure: str | None = None  # why the first model could not be loaded
    strict: bool = False  # fields that are not built are refused, also where an answer is as good without them
    ignored: set[str] = field(default_factory=set)  # fields that were passed over and said in the log
    explaining: asyncio.Lock = field(default_factory=asyncio.Lock)  # an explanation takes memory: one at a time

    def refusal(self) -> ApiError | None:
        """Why nothing is served any more: an engine has died."""
        reason = self.pool.dead()
        return None if reason is None else ApiError(503, f"{reason} Restart the server.", code="engine_dead")

    def responded(self, path: str, status: int) -> None:
        """Count a response that has begun."""
        self.metrics.responded(path, status)

    @asynccontextmanager
    async def engine(
        self,
        model: ServedModel,
        body: Body | None = None,
        answers: int = 1,
        progress: Progress | None = None,
    ) -> AsyncIterator[AsyncEngine]:
        """The engine of a model, for a request that adds so many answers to its queue; `progress` as in the pool.

        Errors inside become ApiErrors that name the field of `body`.
        """
        with error_context(aliases_of(body) if body is not None else NO_ALIASES):
            async with self.pool.use(model, answers, progress) as engine:
                yield engine


def name_of_answer(request: Request, prefix: str) -> tuple[str, int]:
    """The id of a new answer, and when it began, in seconds of Unix time."""
    number, created = request.scope.get(ANSWER) or (uuid.uuid4().hex, int(time.time()))
    return f"{prefix}-{number}", created


class Json(Response):
    """A JSON response. A float that is not a number is a bug in the server, and raises ValueError."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


def state_of(request: Request) -> State:
    state: State = request.app.state.server
    return state


async def read(request: Request, kind: type[B]) -> B:
    """The validated body; raises ApiError for another content type, an invalid body, and one that comes too slowly."""
    given = request.headers.get("content-type", "")
    if given.split(";")[0].strip().lower() != "application/json":
        # Against cross-site requests: a page of another origin can make a browser send forms, but not JSON.
        raise ApiError(415, f"The content type is {given!r:.80}; it must be application/json.", code="content_type")
    try:
        data = await asyncio.wait_for(request.body(), BODY_TIMEOUT)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {BODY_TIMEOUT:.0f} s.") from None
    if (values := data.count(b",")) > MAX_VALUES:
        raise ApiError(
            413,
            f"The body has {values} commas, and {MAX_VALUES} are the most: send less at once.",
            code="body_too_large",
        )
    state = state_of(request)
    if values < LOOP_VALUES:
        body, ignored = parse(kind, data, state.strict)
    else:  # between its steps others have their tokens
        body, ignored = await asyncio.to_thread(parse, kind, data, state.strict)
    request.scope[IGNORED] = ignored
    for name in ignored:
        if name not in state.ignored:
            state.ignored.add(name)
            logger.info("%s: the field %r is not built, and is passed over (said once)", request.url.path, name)
    return body


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; raises ClientDisconnect, and cancels it, if the client closes the connection before."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(wait_disconnect(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
