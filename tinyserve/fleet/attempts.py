"""A request, asked of one replica after another until its answer is whole: retries, splices, and who is suspected.

Knows items and what a stream is; how replicas are called is for `Replicas`, HTTP for the front.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from tinyserve.fleet.keys import Asked
from tinyserve.fleet.messages import Began, Call, Ended, Identity, Item
from tinyserve.fleet.splice import SeamError, Splice
from tinyserve.server.errors import ApiError
from tinyserve.server.sse import dumps

logger = logging.getLogger("tinyserve.fleet")

PLACE_SECONDS = 600.0  # until some replica has to have taken a request
TAKE_SECONDS = 5.0  # until a replica has taken a request that the front has a place for; another is asked then
PAUSE = 0.1  # seconds before a request is sent again that nobody has taken
MOST_STRANGERS = 8  # replicas with other bits that are asked before a stream is given up


class LostError(Exception):
    """A replica has died, or its connection: nothing more comes of the answer."""


class Replicas(Protocol):
    """A way to whichever replicas there are."""

    def call(self, call: Call, key: str | None) -> AsyncGenerator[Item, None]:
        """Ask one of them, always the same one of a key if it can be; raises LostError, and ApiError if none may."""

    def give_up(self, replica: Identity) -> None:
        """End a replica that has fallen silent."""


@dataclass
class Counts:
    """What has befallen requests, for the metrics."""

    lost: int = 0  # attempts whose replica died or fell silent
    retried: int = 0  # requests that were asked again before anything was sent
    spliced: int = 0  # streams that another replica went on with
    failed: int = 0  # requests that were given up


@dataclass
class _Answer:
    """What has come of one answer so far."""

    asked: Asked
    splice: Splice = field(default_factory=Splice)
    began: Began | None = None  # that the client has seen
    fingerprint: str | None = None  # of who has begun it
    deaths: int = 0
    strangers: int = 0

    @property
    def is_stream(self) -> bool:
        return self.began is not None

    def of(self, item: Began) -> bool:
        """Whether this head is that of a stream of events."""
        kinds = [value for name, value in item.headers if name.lower() == b"content-type"]
        return item.status == 200 and any(kind.startswith(b"text/event-stream") for kind in kinds)


class Attempts:
    """Asks replicas, each request up to `retries` times more than once; one silent for `timeout` seconds has died."""

    def __init__(self, replicas: Replicas, retries: int, timeout: float):
        self._replicas, self._retries, self._timeout = replicas, retries, timeout
        self._suspects = asyncio.Lock()
        self.counts = Counts()

    async def ask(self, call: Call, asked: Asked) -> AsyncGenerator[Began | bytes | Ended, None]:
        """The answer: its head, its body in pieces, its end. A body that is no stream is there when its head is.

        Raises ApiError where nothing has begun; a stream that cannot be gone on with has an error as its last event.
        """
        answer, attempt, since = _Answer(asked), 0, time.monotonic()
        while True:
            key = asked.key if not attempt or asked.key is None else f"{asked.key} {attempt}"
            attempt += 1
            try:
                # Two have died of it, or beside it: alone among its like, so that a third death is its own.
                async with self._alone(answer), aclosing(self._once(call, key, answer)) as items:
                    async for item in items:
                        yield item
                return
            except _NotTaken:
                if time.monotonic() - since > PLACE_SECONDS:
                    error = ApiError(503, "No replica takes requests: ask again later.", code="no_replica")
                else:
                    await asyncio.sleep(PAUSE)
                    continue
            except SeamError:
                error = ApiError(502, "The stream broke off, and what another engine says differs.", code="engine_lost")
            except LostError as lost:
                since = time.monotonic()
                answer.deaths += 1
                self.counts.lost += 1
                logger.warning("a replica was lost with a request: %s", lost)
                if (found := self._end_of(answer)) is None:
                    continue
                error = found
            self.counts.failed += 1
            if not answer.is_stream:
                raise error
            yield b"data: " + dumps(error.body) + b"\n\n"
            yield Ended(0, 0)
            return

    def _end_of(self, answer: _Answer) -> ApiError | None:
        """Why a request whose replica was lost is not asked again, or None."""
        if answer.deaths > self._retries:
            return ApiError(
                502,
                f"{answer.deaths} engines were lost, one after the other, as they answered this request.",
                code="engine_lost",
            )
        if answer.is_stream and not answer.asked.is_spliceable:
            return ApiError(
                502, "The engine was lost, and a stream of several answers cannot be gone on with.", code="engine_lost"
            )
        if answer.is_stream:
            self.counts.spliced += 1
            answer.splice.begin_anew()
        else:
            self.counts.retried += 1
        return None

    def _alone(self, answer: _Answer) -> AbstractAsyncContextManager[object]:
        return self._suspects if answer.deaths > 1 else nullcontext()

    async def _once(self, call: Call, key: str | None, answer: _Answer) -> AsyncGenerator[Began | bytes | Ended, None]:
        """One attempt; raises LostError, _NotTaken and SeamError."""
        async with aclosing(self._replicas.call(call, key)) as items:
            try:
                async with asyncio.timeout(min(self._timeout, TAKE_SECONDS)):
                    identity = await anext(items)
            except (LostError, StopAsyncIteration, TimeoutError) as error:
                raise _NotTaken from error
            assert isinstance(identity, Identity)
            if answer.fingerprint is None or not answer.is_stream:
                answer.fingerprint = identity.fingerprint
            elif identity.fingerprint != answer.fingerprint:
                answer.strangers += 1
                if answer.strangers > MOST_STRANGERS:
                    raise SeamError
                raise _NotTaken
            head: Began | None = None
            whole: list[bytes] = []
            while True:
                try:
                    async with asyncio.timeout(self._timeout):
                        item = await anext(items)
                except TimeoutError:
                    self._replicas.give_up(identity)
                    raise LostError(f"{identity.name} was silent for {self._timeout:.0f} s") from None
                except StopAsyncIteration:
                    raise LostError(f"{identity.name} broke off") from None
                match item:
                    case Began():
                        head = item
                        if answer.of(head):
                            if answer.began is None:
                                answer.began = head
                                yield head
                        elif answer.is_stream:
                            raise SeamError  # what began as a stream is an error now
                    case bytes() if head is not None and answer.of(head):
                        if piece := answer.splice.take(item) if answer.asked.is_spliceable else item:
                            yield piece
                    case bytes():
                        whole.append(item)
                    case Ended():
                        assert head is not None
                        if answer.of(head):
                            if answer.asked.is_spliceable:
                                answer.splice.finish()
                        else:
                            yield head
                            yield b"".join(whole)
                        yield item
                        return
                    case _:
                        pass  # a beat


class _NotTaken(Exception):
    """Nobody has taken the request, or somebody who computes other bits."""
