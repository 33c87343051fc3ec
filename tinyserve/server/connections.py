"""HTTP connections within limits: how many there are, and how long one may take for the headers of a request.

Knows uvicorn's protocol, which waits for ever and takes whatever comes; nothing of what requests are for.
"""

import asyncio
import errno
import logging
import sys
from time import monotonic
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinyserve.server.errors import ApiError
from tinyserve.server.sse import dumps

logger = logging.getLogger("tinyserve.server")

HEADER_SECONDS = 15.0
MOST = 1000
OWN_FILES = 64  # of a process, beside its connections


def most_connections() -> int:
    """As many as there are files left for."""
    if sys.platform == "win32":  # which counts no files of a process
        return MOST
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else max(8, min(MOST, soft - OWN_FILES))


class Connection(H11Protocol):
    """One connection. Where there are too many, the one that has been without a request for longest makes room."""

    most = MOST
    opened = 0.0
    _headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.opened = monotonic()
        self._watch_headers()
        if len(self.connections) > self.most:
            waiting = [one for one in self.connections if isinstance(one, Connection) and one.is_waiting]
            min(waiting, key=lambda one: one.opened, default=self).transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Tell that this is no HTTP, unless an answer has begun; a request that breaks off in its body is given up."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True  # or its handler would answer as well
            cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = dumps(ApiError(400, "The request is no HTTP/1.1.", code="invalid_http").body)
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def is_waiting(self) -> bool:
        """Whether no request of this connection is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _watch_headers(self) -> None:
        if not self.is_waiting or self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self._headers_due is None:
            self._headers_due = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_watching(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None


def limit_connections(most: int) -> type[Connection]:
    """A protocol for uvicorn with this limit; it reads one class for all connections."""
    return type("Connection", (Connection,), {"most": most})


def tell_once_of_no_files(loop: asyncio.AbstractEventLoop) -> None:
    """Have the loop say in a line a minute that a process has no file left, and not by a traceback a hundred times a
    second, which fills the disk of its log.
    """
    said = 0.0

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal said
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif monotonic() - said > 60 or not said:
            said = monotonic()
            logger.warning("No more connections can be taken: the process has no file left (ulimit -n).")

    loop.set_exception_handler(handle)
