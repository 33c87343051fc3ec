"""The application: its routes, and the middleware around them.

To add an endpoint: a class of its body in protocol.py; a handler that reads it by `read(request, Body)` of state.py
and enters `state_of(request).engine(...)` (see tokenize.py); a Route below; a row in docs/serving.md. A field that has
another name than the parameter of the Python API it goes to needs a line in aliases.py, so that errors name the field.
"""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tinyserve.errors import TinyserveError
from tinyserve.explain import page as explain_page
from tinyserve.server import chat, completions, embeddings, explain, guards, status, tokenize
from tinyserve.server.access_log import AccessLog
from tinyserve.server.connections import tell_once_of_no_files
from tinyserve.server.errors import ApiError, as_api_error, forget_frames
from tinyserve.server.guards import Admission, Service
from tinyserve.server.metrics import ServerMetrics
from tinyserve.server.page import page
from tinyserve.server.pool import ModelPool
from tinyserve.server.state import State


class Extension(Protocol):
    """Endpoints beside the API's own; `max_bodies` has the most bytes of a body, by path, where it is another."""

    @property
    def max_bodies(self) -> Mapping[str, int]: ...

    @property
    def routes(self) -> list[Route]: ...

    def running(self, app: Starlette) -> AbstractAsyncContextManager[None]:
        """A block that lasts as long as the server."""


def create_app(
    pool: ModelPool,
    admission: Admission | None = None,
    *,
    tool_format: str | None = None,
    strict: bool = False,
    access_log: bool = False,
    extension: Extension | None = None,
    on_failure: Callable[[Exception], None] = lambda error: None,
) -> Starlette:
    """The ASGI application that serves the models of a pool; it loads the first when it starts.

    tool_format: for models whose chat templates do not imply one (`tools.FORMATS`).
    strict: refuse every field that is not built, also those that an answer is as good without.
    access_log: log a line for each request.
    extension: more endpoints, and what runs behind them as long as the server.
    on_failure: called with the error if the first model cannot be loaded.
    """
    state = State(pool, ServerMetrics(pool), tool_format, strict=strict)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        tell_once_of_no_files(asyncio.get_running_loop())
        first = asyncio.create_task(_load_first(state, on_failure))  # requests meanwhile wait for the same load
        try:
            async with extension.running(app) if extension is not None else nullcontext():
                yield
        finally:
            first.cancel()
            await pool.close()

    routes = [*(extension.routes if extension is not None else ()), *_routes()]
    max_bodies = extension.max_bodies if extension is not None else {}
    return assemble(routes, state, admission or Admission(), lifespan, access_log, max_bodies)


def assemble(
    routes: list[Route],
    service: Service,
    admission: Admission,
    lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]],
    access_log: bool,
    max_bodies: Mapping[str, int] | None = None,
) -> Starlette:
    """An application of these routes and the page behind the guards, with errors in OpenAI's form."""
    routes = [*routes, Route("/", _page())]
    app = Starlette(
        routes=routes,
        middleware=[
            *([Middleware(AccessLog)] if access_log else []),
            *_middleware(admission, service, [route.path for route in routes], max_bodies or {}),
        ],
        lifespan=lifespan,
        exception_handlers={
            ApiError: _api_error,
            TinyserveError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _client_closed,
            Exception: _api_error,
        },
    )
    app.state.server = service
    return app


def _routes() -> list[Route]:
    return [
        Route("/v1/chat/completions", chat.chat_completions, methods=["POST"]),
        Route("/v1/completions", completions.completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings.embeddings, methods=["POST"]),
        Route("/v1/models", status.models),
        Route("/v1/models/{name:path}", status.model),
        Route("/explain", explain.explain, methods=["POST"]),
        Route("/tokenize", tokenize.tokenize, methods=["POST"]),
        Route("/detokenize", tokenize.detokenize, methods=["POST"]),
        Route("/tokenizer_info", tokenize.tokenizer_info),
        Route("/apply-template", tokenize.apply_template, methods=["POST"]),
        Route("/health", status.health),
        Route("/ready", status.ready),
        Route("/metrics", status.metrics),
        Route("/stats", status.stats),
        Route("/inspect", status.inspect),
    ]


def _middleware(
    admission: Admission, service: Service, paths: Sequence[str], max_bodies: Mapping[str, int]
) -> list[Middleware]:
    """What a request passes before it comes to its handler, from the outside in."""
    middleware = [Middleware(guards.ReadToTheEnd, limit=admission.max_body), Middleware(guards.PlainPaths)]
    middleware.append(Middleware(guards.RequestMetrics, service=service, paths=paths))
    if admission.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=admission.cors_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                allow_private_network=True,  # which Chrome asks for where a page of the web calls this machine
                expose_headers=["x-tinyserve-ignored"],
            )
        )
    if admission.hosts:
        middleware.append(Middleware(guards.AllowedHosts, hosts=admission.hosts))
    middleware.append(Middleware(guards.Unavailable, service=service))
    if admission.api_keys:
        middleware.append(Middleware(guards.ApiKeys, keys=admission.api_keys))
    return [
        *middleware,
        Middleware(guards.SizeLimits, limit=admission.max_body, of_paths=max_bodies),
        Middleware(guards.IgnoredFields),
    ]


async def _load_first(state: State, on_failure: Callable[[Exception], None]) -> None:
    model = state.pool.default
    try:
        async with state.pool.use(model):
            state.is_ready = True
    except Exception as error:
        state.failure = f"{model.name} could not be loaded: {error}"
        on_failure(error)


async def _api_error(request: Request, error: Exception) -> Response:
    response = as_api_error(error).response()
    if isinstance(error, ApiError | TinyserveError):  # others go on to the log
        forget_frames(error)
    return response


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors: an unknown path or method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        what = f"{status.path_of(request)} does not take {request.method:.20}"
        return ApiError(405, f"{what}.", code="method").response()
    return await status.not_found(request, error)


async def _client_closed(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nginx's "client closed request", for the metrics: nobody reads it


def _page() -> Callable[[Request], Awaitable[Response]]:
    """The page at /, under a Content-Security-Policy that allows its own script and style alone."""
    text = page()
    # An explanation is shown in a frame, to which the same policy applies.
    bodies = re.findall("<script>(.*?)</script>", text + explain_page.template(), re.DOTALL)
    scripts = " ".join(map(_hash, bodies))
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    async def send_page(request: Request) -> Response:
        return Response(text, media_type="text/html; charset=utf-8", headers=headers)

    return send_page


def _hash(body: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'"
