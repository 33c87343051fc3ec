"""The access log: a line for each request, once its response has ended.

Knows ASGI and a logger; what a request asked for beyond its path is not logged.
"""

import logging
from contextvars import ContextVar
from dataclasses import dataclass
from time import perf_counter
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("tinyserve.server.access")

_LONGEST_PATH = 200  # characters


@dataclass
class Tokens:
    """What was read and written for one request."""

    prompt: int = 0
    output: int = 0


_tokens: ContextVar[Tokens | None] = ContextVar("tokens", default=None)  # of the request that a task belongs to


def hear_tokens() -> Tokens:
    """What `count_tokens` adds to from now on, in this task and in those that it starts."""
    tokens = Tokens()
    _tokens.set(tokens)
    return tokens


def count_tokens(prompt: int, output: int) -> None:
    """Add to the tokens of the request that is being answered, if it is logged."""
    if (tokens := _tokens.get()) is not None:
        tokens.prompt += prompt
        tokens.output += output


class AccessLog:
    """Logs client address, method, path, status, milliseconds to the end of the response, and tokens where there are.

    A logger swallows what goes wrong as it writes, so that no request fails by it.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, tokens, status, whole = perf_counter(), hear_tokens(), 0, False
        # As it came, for others change it; quoted, or it might leave its line; without the query, which may have keys.
        path = quote(scope["path"])

        async def noted_send(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, receive, noted_send)
        except Exception:
            status, whole = status or 500, True  # what is outside of this answers with it
            raise
        finally:
            client = scope.get("client")
            words = [client[0] if client else "-", scope["method"], _shortened(path), str(status or 499)]
            words.append(f"{(perf_counter() - begun) * 1e3:.0f} ms")
            if tokens.prompt:
                words.append(f"{tokens.prompt}+{tokens.output} tokens")
            if not whole:
                words.append("client left")
            logger.info(" ".join(words))


def _shortened(path: str) -> str:
    return path if len(path) <= _LONGEST_PATH else f"{path[:_LONGEST_PATH]}..."
