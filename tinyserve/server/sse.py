"""Server-sent events: a response whose events one task writes and another sends, until either ends.

Knows bytes and connections; what the events contain is up to the handlers.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tinyserve.errors import TinyserveError
from tinyserve.server.errors import ApiError, as_api_error, forget_frames

logger = logging.getLogger("tinyserve.server")

KEEP_ALIVE = 10.0  # seconds without an event after which a comment is sent, so that no proxy closes the connection
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # else nginx buffers the tokens
]


class SSEWriter:
    """Queues events in order. Comments keep connections open and report progress; OpenAI's clients skip them."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()

    def event(self, data: dict[str, Any]) -> None:
        self._queue.put_nowait(b"data: " + dumps(data) + b"\n\n")

    def comment(self, text: str) -> None:
        """One line; line breaks in `text` become spaces."""
        self._queue.put_nowait(b": " + " ".join(text.split()).encode() + b"\n\n")

    def progress(self, stage: str, done: int, total: int) -> None:
        """A comment on the progress of a stage, such as loading."""
        self.comment(f"{stage} {done}/{total}" if total else stage)

    def prefill(self, done: int, total: int) -> None:
        """A comment on how many tokens of a prompt are computed."""
        self.progress("prefill", done, total)

    def done(self) -> None:
        """OpenAI's last event."""
        self._queue.put_nowait(b"data: [DONE]\n\n")

    def close(self) -> None:
        self._queue.put_nowait(None)

    async def get(self) -> bytes | None:
        """All queued bytes, as soon as there are any; None at the end."""
        try:
            async with asyncio.timeout(KEEP_ALIVE):  # wait_for may drop a cancellation
                first = await self._queue.get()
        except TimeoutError:
            return b": waiting\n\n"
        parts = [first]
        while parts[-1] is not None and not self._queue.empty():
            parts.append(self._queue.get_nowait())
        if parts[-1] is None and len(parts) > 1:
            self.close()
        return None if first is None else b"".join(part for part in parts if part is not None)


class EventStream(Response):
    """Runs `write` in a task of its own, which is cancelled when the client disconnects, and awaited in every case.

    An error before the first event is a plain response with its status; a later one is the stream's last event.
    """

    def __init__(self, write: Callable[[SSEWriter], Awaitable[None]]):
        super().__init__(None, 200)
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = SSEWriter()
        writer = asyncio.create_task(self._run(events))
        sender = asyncio.create_task(self._send(events, writer, scope, receive, send))
        await while_connected(receive, sender, writer)

    async def _run(self, events: SSEWriter) -> ApiError | None:
        try:
            await self._write(events)
        except Exception as error:
            api_error = as_api_error(error)
            if api_error.status == 500:  # else its traceback would be lost
                logger.error("a stream failed", exc_info=error)
            if isinstance(error, ApiError | TinyserveError):
                forget_frames(error)
            return api_error
        finally:
            events.close()
        return None

    async def _send(
        self, events: SSEWriter, writer: "asyncio.Task[ApiError | None]", scope: Scope, receive: Receive, send: Send
    ) -> None:
        piece = await events.get()
        if piece is None and (error := await writer) is not None:
            await error.response()(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        while piece is not None:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            piece = await events.get()
        if (error := await writer) is not None:
            await send(
                {"type": "http.response.body", "body": b"data: " + dumps(error.body) + b"\n\n", "more_body": True}
            )
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(receive: Receive, sender: "asyncio.Task[None]", *others: "asyncio.Task[Any]") -> None:
    """Wait until a response is sent, or its client has gone; then all the tasks are cancelled, and have ended.

    Raises what the sender raised, but for a connection that is closed.
    """
    watcher = asyncio.create_task(wait_disconnect(receive))
    try:
        await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        tasks = (sender, watcher, *others)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    if isinstance(results[0], Exception) and not isinstance(results[0], OSError):
        raise results[0]


async def wait_disconnect(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


# Lines end at these for Python's splitlines and its like, by which clients take streams apart; not for JSON.
LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def dumps(data: Any) -> bytes:
    """JSON as short as it can be, in UTF-8, and one line to everybody."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (text if text.isascii() else text.translate(LINE_ENDS)).encode()
