"""ASGI middleware around the handlers: refusals in OpenAI's form, and counts of responses."""

import asyncio
import hashlib
import hmac
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinyserve.server.errors import ApiError
from tinyserve.server.options import ServeOptions
from tinyserve.server.state import IGNORED

# Paths that need no key: the page, which asks its user for one, and the probes of supervisors.
OPEN_PATHS = frozenset({"/", "/health", "/ready"})


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Who may call, and with how much; by default everybody of no other origin.

    api_keys: a request must carry one of these; empty for no authentication.
    hosts: the Host headers that are accepted; empty for all.
    cors_origins: pages of these origins may call, "*" for all.
    max_body: bytes.
    """

    api_keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    max_body: int = ServeOptions.max_body


class Service(Protocol):
    """What stands behind the guards."""

    is_draining: bool  # running requests are finished, new ones refused

    def refusal(self) -> ApiError | None:
        """Why nothing at all is served, or None."""

    def responded(self, path: str, status: int) -> None:
        """Count a response that has begun."""


class Guard(ABC):
    """Passes a request on unless `refusal` returns an error."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self.refusal(scope)) is not None:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    @abstractmethod
    def refusal(self, scope: Scope) -> ApiError | None:
        """Why this request is refused, or None."""


class Unavailable(Guard):
    """Refuses every path, /health too, once the server is draining or cannot serve at all."""

    def __init__(self, app: ASGIApp, service: Service):
        super().__init__(app)
        self._service = service

    def refusal(self, scope: Scope) -> ApiError | None:
        if self._service.is_draining:
            return ApiError(503, "The server is shutting down.", code="shutting_down", retry_after=10)
        return self._service.refusal()


class ApiKeys(Guard):
    """Requires one of the API keys, compared in constant time."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        super().__init__(app)
        self._digests = [_digest(key) for key in keys]

    def refusal(self, scope: Scope) -> ApiError | None:
        if scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":  # a CORS preflight carries no key
            return None
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # Every key is compared, and all digests have one length: the time does not depend on which matches.
        matches = sum(hmac.compare_digest(given, digest) for digest in self._digests)
        if kind.lower() == "bearer" and matches:
            return None
        what = "is none of this server's" if key else "is missing: send Authorization: Bearer KEY"
        return ApiError(401, f"The API key {what}.", code="invalid_api_key")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class AllowedHosts(Guard):
    """Refuses a Host header that is not among `hosts`, against DNS rebinding.

    A foreign page can let its own name resolve to 127.0.0.1; its scripts would then be of this server's origin.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str]):
        super().__init__(app)
        self._hosts = frozenset(host.lower() for host in hosts)

    def refusal(self, scope: Scope) -> ApiError | None:
        given = Headers(scope=scope).get("host", "")
        name = given.rpartition(":")[0] if given.rpartition(":")[2].isdigit() else given
        if name.lower().strip("[]") in self._hosts:
            return None
        return ApiError(
            403,
            f"The Host is {given!r:.80}, and this server is only for {', '.join(sorted(self._hosts))}.",
            code="host",
        )


MAX_HEADERS = 16 << 10  # bytes
REST_SECONDS = 5.0  # for what is left of a body that nobody reads


class SizeLimits:
    """Refuses headers above MAX_HEADERS bytes, and bodies above `limit` bytes, with a Content-Length or without.

    `of_paths` has another limit for some paths.
    """

    def __init__(self, app: ASGIApp, limit: int, of_paths: Mapping[str, int] | None = None):
        self.app, self._limit, self._of_paths = app, limit, of_paths or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADERS:
            error = ApiError(431, f"The headers have more than {MAX_HEADERS} bytes.", code="headers_too_large")
            await error.response()(scope, receive, send)
            return
        limit = self._of_paths.get(scope["path"], self._limit)
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdigit() and int(announced) > limit:
            await _too_large(int(announced), limit).response()(scope, receive, send)
            return
        size = 0

        async def limited_receive() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise _too_large(size, limit)
            return message

        await self.app(scope, limited_receive, send)


def _too_large(size: int, limit: int) -> ApiError:
    return ApiError(413, f"The body has {size} bytes or more, and {limit} are the most.", code="body_too_large")


class ReadToTheEnd:
    """Reads what is left of a body, up to `limit` bytes, before an answer is complete.

    A connection that is closed with bytes unread is reset, and whoever still sends never sees why he was refused.
    """

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Who waits to be told to go on is told to stop.
        left = 0 if Headers(scope=scope).get("expect") else self._limit

        async def counted_receive() -> Message:
            nonlocal left
            message = await receive()
            more = message["type"] == "http.request" and message.get("more_body", False)
            left = left - len(message.get("body", b"")) if more else 0
            return message

        async def last_send(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                with suppress(TimeoutError):
                    async with asyncio.timeout(REST_SECONDS):
                        while left > 0:
                            await counted_receive()
            await send(message)

        await self.app(scope, counted_receive, last_send)


class PlainPaths:
    """A slash at the end of a path, and two in a row, are as none and one: clients join addresses as they like."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = "/" + "/".join(part for part in scope["path"].split("/") if part)
        await self.app(scope, receive, send)


class IgnoredFields:
    """Names the fields of a body that were passed over in the header x-tinyserve-ignored."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start" and (names := scope.get(IGNORED)):
                header = (b"x-tinyserve-ignored", ", ".join(names).encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        await self.app(scope, receive, send_with_header if scope["type"] == "http" else send)


class RequestMetrics:
    """Counts responses by path and status."""

    def __init__(self, app: ASGIApp, service: Service, paths: Sequence[str]):
        self.app, self._service, self._paths = app, service, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Clients may ask for any path: a label for each would fill the memory.
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._service.responded(path, message["status"])
            await send(message)

        await self.app(scope, receive, counted_send if scope["type"] == "http" else send)
