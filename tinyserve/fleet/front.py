"""The front of a fleet: a server without an engine, which passes requests on to replicas behind the same guards.

Knows HTTP, and who waits for whom; what an endpoint means is for the replicas.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tinyserve.errors import TinyserveError
from tinyserve.fleet.attempts import Attempts
from tinyserve.fleet.handle import POLL_SECONDS, Application, Condition
from tinyserve.fleet.keys import Asked, read_request
from tinyserve.fleet.messages import Began, Call, Ended, Report
from tinyserve.server.access_log import count_tokens
from tinyserve.server.app import assemble
from tinyserve.server.connections import tell_once_of_no_files
from tinyserve.server.errors import ApiError
from tinyserve.server.guards import Admission
from tinyserve.server.metrics import EngineCollector, count_responses
from tinyserve.server.sse import KEEP_ALIVE, while_connected
from tinyserve.server.state import BODY_TIMEOUT, LOOP_VALUES, MAX_VALUES, Json

logger = logging.getLogger("tinyserve.fleet")

WAIT_SECONDS = 600.0  # for a place at a replica, loading included
MISSED_POLLS = 3  # of the cluster, after which it is given up: before Ray ends this process, after a minute
# Of the client's connection, or of what is the front's own to know.
_OWN_HEADERS = frozenset(
    (b"host", b"connection", b"content-length", b"transfer-encoding", b"authorization", b"cookie", b"expect",
     b"accept-encoding", b"keep-alive", b"upgrade", b"te")
)  # fmt: skip
_FORWARDED = {
    "POST": ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/explain", "/tokenize", "/detokenize",
             "/apply-template"),
    "GET": ("/v1/models", "/v1/models/{name:path}", "/tokenizer_info", "/stats", "/inspect"),
}  # fmt: skip


class Gate:
    """Places at the replicas, first come first served; beyond them `max_queue` requests wait."""

    def __init__(self, max_queue: int):
        self._max_queue = max_queue
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.places, self.taken = 0, 0
        self._seconds = 1.0  # per request, an exponential moving average

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def set_places(self, places: int) -> None:
        """How many requests the replicas take at a time."""
        self.places = places
        self._wake()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place for the block; raises ApiError 429 where too many wait, 503 where none becomes free."""
        if self.taken >= self.places or self._waiting:
            await self._wait()
        else:
            self.taken += 1
        begun = time.monotonic()
        try:
            yield
            self._seconds += 0.1 * (time.monotonic() - begun - self._seconds)
        finally:
            self.taken -= 1
            self._wake()

    def send_away(self) -> None:
        """Refuse all who wait, as the server ends."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(ApiError(503, "The server is shutting down.", code="shutting_down"))

    async def _wait(self) -> None:
        if len(self._waiting) >= self._max_queue:
            seconds = self._seconds * (1 + len(self._waiting)) / max(1, self.places)
            raise ApiError(
                429,
                f"{self.taken} requests run and {len(self._waiting)} wait, which is all there is room for: ask again "
                "later.",
                code="queue_full",
                retry_after=max(1, min(60, math.ceil(seconds))),
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await turn
        except BaseException as error:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif turn.done() and not turn.cancelled() and turn.exception() is None:  # its turn came as it left
                self.taken -= 1
                self._wake()
            if isinstance(error, TimeoutError):
                raise ApiError(503, "No replica became free: ask again later.", code="no_replica") from None
            raise

    def _wake(self) -> None:
        while self._waiting and self.taken < self.places:
            turn = self._waiting.popleft()
            if not turn.done():
                self.taken += 1
                turn.set_result(None)


@dataclass
class Front:
    """What stands behind the guards: the application, who waits for it, and how it is."""

    model: str
    application: Application
    attempts: Attempts
    gate: Gate
    places: int  # at each replica
    wanted: int  # replicas that make it ready
    is_draining: bool = False
    condition: Condition = field(default_factory=Condition)
    failure: str | None = None  # after which nothing is served
    is_lost: bool = False  # the cluster does not answer
    reports: dict[str, Report] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.registry = CollectorRegistry()
        self._responses = count_responses(self.registry)
        self.registry.register(_FrontCollector(self))
        self.registry.register(
            EngineCollector(
                ("model", "replica"), lambda: {(self.model, name): one.stats for name, one in self.reports.items()}
            )
        )

    def refusal(self) -> ApiError | None:
        """Why nothing is served any more: the cluster is gone."""
        return None if self.failure is None else ApiError(503, f"{self.failure} Restart the server.", code="dead")

    def responded(self, path: str, status: int) -> None:
        """Count a response that has begun."""
        self._responses.labels(path, str(status)).inc()

    def take(self, condition: Condition) -> None:
        """Hear how the application is."""
        if condition.running != self.condition.running:
            logger.info("%s: %d of %d replicas run", self.model, condition.running, self.wanted)
        self.condition = condition
        self.gate.set_places(condition.running * self.places)


async def watch(front: Front, on_failure: Callable[[Exception], None]) -> None:
    """Keep the front told of how its application is; an application that never comes up is a failure of the server."""
    missed, was_up = 0, False
    while True:
        try:
            condition = await front.application.condition()
        except TinyserveError as error:
            missed += 1
            if missed >= MISSED_POLLS:
                front.failure, front.is_lost = str(error), True
                front.gate.send_away()
                on_failure(error)
                return
        else:
            missed = 0
            front.take(condition)
            if condition.failure is not None and not was_up:
                front.failure = f"{front.model} could not be loaded: {condition.failure.rstrip('.')}."
                on_failure(TinyserveError(front.failure))
                return
            was_up = was_up or condition.is_up
        if front.is_draining and not front.condition.running:
            front.gate.send_away()
        await asyncio.sleep(POLL_SECONDS)


def create_front(
    front: Front,
    admission: Admission,
    deploy: Callable[[], Awaitable[None]],
    take_down: Callable[[], Awaitable[None]],
    on_failure: Callable[[Exception], None],
    *,
    access_log: bool = False,
) -> Starlette:
    """The ASGI application of a front, which has its application deployed as it starts, and taken down at its end."""

    async def start() -> None:
        try:
            await deploy()
            await front.application.attach()
        except Exception as error:
            on_failure(error)
            return
        await watch(front, on_failure)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        tell_once_of_no_files(asyncio.get_running_loop())
        watching = asyncio.create_task(start())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            if not front.is_lost:
                await take_down()

    forwarded = [Route(path, _forward, methods=[method]) for method, paths in _FORWARDED.items() for path in paths]
    own = [Route("/health", _health), Route("/ready", _ready), Route("/metrics", _metrics)]
    return assemble([*forwarded, *own], front, admission, lifespan, access_log)


def _front_of(request: Request) -> Front:
    front: Front = request.app.state.server
    return front


async def _health(request: Request) -> Response:
    """Liveness: a replica runs."""
    front = _front_of(request)
    if not front.condition.running:
        raise ApiError(503, f"No replica of {front.model} runs.", code="no_replica", retry_after=1)
    return Json({"status": "ok"})


async def _ready(request: Request) -> Response:
    """Readiness: as many run as were asked for."""
    front = _front_of(request)
    running = front.condition.running
    if running < front.wanted:
        what = f"{running} of {front.wanted} replicas of {front.model} are ready."
        raise ApiError(503, what, code="not_ready", retry_after=1)
    return Json({"status": "ready", "replicas": running})


async def _metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format: the front's own, and what each replica tells of its engine now."""
    front = _front_of(request)
    front.reports = {one.identity.name: one for one in await front.application.reports()}
    return Response(generate_latest(front.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _forward(request: Request) -> Response:
    try:
        body = await asyncio.wait_for(request.body(), BODY_TIMEOUT)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {BODY_TIMEOUT:.0f} s.") from None
    return _Forwarded(_front_of(request), request, body)


class _Forwarded(Response):
    """A replica's response, as it comes; a client that leaves ends it there, too."""

    def __init__(self, front: Front, request: Request, body: bytes):
        super().__init__(None, 200)
        self._front, self._request, self._content = front, request, body
        self._is_stream, self._sent = False, time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.create_task(self._send(send))
        await while_connected(receive, sender, asyncio.create_task(self._keep_alive(send)))

    async def _send(self, send: Send) -> None:
        request, front = self._request, self._front
        values = self._content.count(b",")
        if values > MAX_VALUES:
            asked = Asked(None, False, self._content, None)  # the replica refuses it
        elif values < LOOP_VALUES:
            asked = read_request(request.url.path, request.headers, self._content)
        else:
            asked = await asyncio.to_thread(read_request, request.url.path, request.headers, self._content)
        headers = [(name, value) for name, value in request.headers.raw if name not in _OWN_HEADERS]
        call = Call(request.method, request.url.path, request.scope["query_string"], headers, asked.body, asked.answer)
        async with front.gate.place(), aclosing(front.attempts.ask(call, asked)) as items:
            async for item in items:
                match item:
                    case Began(status, raw):
                        await send({"type": "http.response.start", "status": status, "headers": raw})
                        self._is_stream = (b"content-type", b"text/event-stream; charset=utf-8") in raw
                    case Ended(prompt_tokens, output_tokens):
                        count_tokens(prompt_tokens, output_tokens)
                        self._is_stream = False
                        await send({"type": "http.response.body", "body": b"", "more_body": False})
                    case bytes():
                        await send({"type": "http.response.body", "body": item, "more_body": True})
                self._sent = time.monotonic()

    async def _keep_alive(self, send: Send) -> None:
        """A comment now and then while a stream waits for another replica, so that no proxy closes the connection."""
        while True:
            await asyncio.sleep(max(0.1, self._sent + KEEP_ALIVE - time.monotonic()))
            if self._is_stream and time.monotonic() - self._sent >= KEEP_ALIVE:
                await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
                self._sent = time.monotonic()


class _FrontCollector(Collector):
    def __init__(self, front: Front):
        self._front = front

    def collect(self) -> "list[Metric]":
        front, counts = self._front, self._front.attempts.counts
        gauges = {
            "tinyserve_replicas_running": ("Replicas that take requests.", front.condition.running),
            "tinyserve_front_requests_running": ("Requests that replicas have.", front.gate.taken),
            "tinyserve_front_requests_waiting": ("Requests that wait for a place.", front.gate.num_waiting),
        }
        counters = {
            "tinyserve_replicas_lost": ("Requests whose replica died or fell silent.", counts.lost),
            "tinyserve_requests_retried": ("Those of which nothing had been sent, asked again.", counts.retried),
            "tinyserve_streams_spliced": ("Those that another replica went on with.", counts.spliced),
            "tinyserve_requests_failed": ("Those that were given up.", counts.failed),
        }
        bits = GaugeMetricFamily(
            "tinyserve_replica", "Who runs; whoever has the same fingerprint computes the same bits.",
            labels=["model", "replica", "fingerprint"],
        )  # fmt: skip
        for name, report in front.reports.items():
            bits.add_metric([front.model, name, report.identity.fingerprint], 1)
        return [
            bits,
            *(GaugeMetricFamily(name, help_, value=value) for name, (help_, value) in gauges.items()),
            *(CounterMetricFamily(name, help_, value=value) for name, (help_, value) in counters.items()),
        ]
