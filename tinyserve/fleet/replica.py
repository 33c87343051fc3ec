"""One engine of a fleet: the ASGI application of server/, called in its process, as a deployment of Ray Serve.

Knows ASGI and an engine; who calls, and what becomes of answers that break off, is for the fronts.
"""

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote

from starlette.types import Message, Scope

from tinyserve.engine_options import EngineOptions
from tinyserve.errors import EngineDeadError
from tinyserve.fleet.messages import Began, Call, Ended, Identity, Item, Report
from tinyserve.server.access_log import Tokens, hear_tokens
from tinyserve.server.app import create_app
from tinyserve.server.guards import Admission
from tinyserve.server.heaps import keep_heaps_small
from tinyserve.server.pool import ModelPool
from tinyserve.server.state import ANSWER, State

logger = logging.getLogger("tinyserve.fleet")

STUCK_SECONDS = 120.0  # with work and without a step, after which an engine is given up
# From one part of a body to the next, in seconds: each takes this process and the front half a millisecond, which a
# small model's token takes as well. Whoever reads has 25 parts a second, the first and the last at once.
PACE = 0.04
_DEAD = 70  # the exit code of a replica whose engine is dead


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """What each replica of a fleet is told."""

    name: str  # that clients give the model
    source: str
    engine: EngineOptions
    tool_format: str | None = None
    strict: bool = False
    max_queue: int
    max_body: int  # bytes
    cores: int  # that it pins itself to, where each has its own; 0 for none
    beat: float  # seconds
    version: str = ""  # of all that the fleet was told


class Replica:
    """One engine; the fronts call `answer`, and Ray Serve `check_health`."""

    async def __init__(self, options: ReplicaOptions):  # type: ignore[misc]  # Serve awaits it
        from ray import serve

        context = serve.get_replica_context()
        _pin(context.rank.local_rank, options.cores)
        keep_heaps_small()
        await self.load(options, context.replica_tag, context.replica_id.to_full_id_str())

    async def load(self, options: ReplicaOptions, name: str, actor: str) -> None:
        """Load the model; raises what is wrong with it."""
        self._options = options
        pool = ModelPool({options.name: options.source}, options.engine, 1 << 62, options.max_queue)
        self.app = create_app(
            pool, Admission(max_body=options.max_body), tool_format=options.tool_format, strict=options.strict
        )
        self._lifespan = self.app.router.lifespan_context(self.app)
        await self._lifespan.__aenter__()  # the process ends it
        async with pool.use(pool.default) as engine:
            self._llm = engine.llm
        bits = await asyncio.to_thread(self._llm.fingerprint)
        self._identity = Identity(name, actor, bits)
        self._steps, self._stepped = 0, time.monotonic()

    @property
    def state(self) -> State:
        """The application's."""
        state: State = self.app.state.server
        return state

    async def answer(self, call: Call) -> AsyncGenerator[Item, None]:
        """Who has taken the request, the response as it comes, and its end; a beat where there is nothing else.

        Leaving the loop is as a client that closes its connection.
        """
        yield self._identity
        outbox = _Outbox()
        gone, unread = asyncio.Event(), [call.body]

        async def receive() -> Message:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> Tokens:
            tokens = hear_tokens()
            try:
                await self.app(_scope(call), receive, outbox.put)
            finally:
                outbox.end()
            return tokens

        task = asyncio.create_task(run())
        try:
            while not outbox.has_ended:
                head, body = await outbox.take(self._options.beat)
                self._leave_if_dead()
                if head is not None:
                    yield Began(head["status"], list(head.get("headers", ())))
                if body:
                    yield body
                    await asyncio.wait({task}, timeout=PACE)
                elif head is None and not outbox.has_ended:
                    yield None
            tokens = await task
            yield Ended(tokens.prompt, tokens.output)
        finally:
            gone.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def report(self) -> Report:
        """What it is doing."""
        return Report(self._identity, self._llm.stats(), self._options.version)

    async def check_health(self) -> None:
        """Raise EngineDeadError where the engine is dead, or has work and makes no step; Ray Serve replaces it."""
        self._leave_if_dead()
        stats, now = self._llm.stats(), time.monotonic()
        if stats.steps != self._steps or not stats.num_running + stats.num_waiting:
            self._steps, self._stepped = stats.steps, now
        elif now - self._stepped > STUCK_SECONDS:
            raise EngineDeadError(f"The engine has made no step for {STUCK_SECONDS:.0f} s.")

    def _leave_if_dead(self) -> None:
        """End the process of a dead engine: fronts know what to do about that, and nobody waits for it."""
        if (error := self._llm.thread.dead_error) is not None:
            logger.critical("The engine is dead: %s", error)
            logging.shutdown()
            os._exit(_DEAD)


class _Outbox:
    """What an application sends, until it is taken."""

    def __init__(self) -> None:
        self._head: Message | None = None
        self._body: list[bytes] = []
        self._news = asyncio.Event()
        self._is_over = False

    async def put(self, message: Message) -> None:
        """ASGI's `send`."""
        if message["type"] == "http.response.start":
            self._head = message
        else:
            self._body.append(message.get("body", b""))
        self._news.set()

    def end(self) -> None:
        self._is_over = True
        self._news.set()

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left, and nothing comes."""
        return self._is_over and not self._body and self._head is None

    async def take(self, patience: float) -> tuple[Message | None, bytes]:
        """The head of the response and the bytes of its body that have come, once there are any, or after seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):  # wait_for may drop a cancellation
                await self._news.wait()
        self._news.clear()
        head, body = self._head, b"".join(self._body)
        self._head, self._body = None, []
        return head, body


def _scope(call: Call) -> Scope:
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": quote(call.path).encode(),
        "root_path": "",
        "query_string": call.query,
        "headers": call.headers,
        "client": None,
        "server": None,
        "state": {},
    }
    if call.answer is not None:
        scope[ANSWER] = call.answer
    return scope


def _pin(rank: int, cores: int) -> None:
    """Have this process run on the cores of its rank on this machine, if there are so many."""
    if not cores or sys.platform != "linux":  # elsewhere the system decides
        return
    usable = sorted(os.sched_getaffinity(0))
    own = usable[rank * cores : (rank + 1) * cores]
    if len(own) == cores:
        os.sched_setaffinity(0, own)
