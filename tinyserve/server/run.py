"""A server as a process: its socket, its signals, its shutdown.

The first SIGTERM or SIGINT drains it: running requests are finished, new ones refused. A second one stops it at once.
On Windows nobody can send SIGTERM, and Ctrl-Break (SIGBREAK) stands in for it.
"""

import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from tinyserve.checkpoints.model_ref import ModelRef
from tinyserve.errors import TinyserveError, UserError
from tinyserve.server import heaps
from tinyserve.server.app import Extension, create_app
from tinyserve.server.connections import limit_connections, most_connections
from tinyserve.server.guards import MAX_HEADERS, Admission, Service
from tinyserve.server.options import API_KEY_VARIABLE, ServeOptions
from tinyserve.server.pool import pool_of
from tinyserve.text.tools import format_named

logger = logging.getLogger("tinyserve.server")

IDLE = 75  # seconds to keep an idle connection: more than nginx's 60, which may otherwise write to a closed one
GRACE = 2.0  # seconds behind the drain timeout, in which what it has ended is put away


def serve(options: ServeOptions, extension: Extension | None = None) -> int:
    """Serve until a signal comes; returns the exit code. Raises UserError for options that would be unsafe or wrong."""
    check(options)
    heaps.keep_heaps_small()
    listener = listen(options.host, options.port)

    def make_app(admission: Admission, fail: Callable[[Exception], None]) -> Starlette:
        return create_app(
            pool_of(options),
            admission,
            tool_format=options.tool_format,
            strict=options.strict,
            access_log=options.access_log,
            extension=extension,
            on_failure=fail,
        )

    return run(options, listener, make_app)


def check(options: ServeOptions) -> None:
    """Raise UserError for options that would be unsafe, or whose mistakes would show only when a model is loaded."""
    if not (options.api_keys or options.no_auth or listens_on_loopback(options.host)):
        raise UserError(
            f"--host {options.host} lets other machines in: set an API key ({API_KEY_VARIABLE}, or --api-key-file), or "
            "say --no-auth if everybody may use it."
        )
    if options.tool_format is not None:
        format_named(options.tool_format)
    for source in options.models.values():
        ModelRef.parse(source)  # whether there is such a repository, only the Hub knows


def run(
    options: ServeOptions,
    listener: socket.socket,
    make_app: Callable[[Admission, Callable[[Exception], None]], Starlette],
    grace: float = GRACE,
) -> int:
    """Serve an application until a signal comes, or it calls what it is given with an error; returns the exit code.

    `grace` are the seconds behind the drain timeout in which it puts away what it has.
    """
    failures: list[Exception] = []

    def fail(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    host, port = listener.getsockname()[:2]
    # Without API keys, only the Host header tells this machine's own pages from those of a rebound name.
    hosts = (
        ("localhost", "127.0.0.1", "::1", options.host)
        if listens_on_loopback(options.host) and not options.api_keys
        else ()
    )
    admission = Admission(
        api_keys=options.api_keys, hosts=hosts, cors_origins=options.cors_origins, max_body=options.max_body
    )
    app = make_app(admission, fail)
    protocol = limit_connections(most_connections())
    config = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="on", access_log=False, log_config=None, server_header=False,
        loop="asyncio",  # also where another package has brought uvloop
        backlog=64, h11_max_incomplete_event_size=2 * MAX_HEADERS, timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=max(1, round(options.drain_timeout)),
    )  # fmt: skip
    server = _Server(config, app.state.server, options.drain_timeout + grace)
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{port}"
    options.on_listen(url)
    with listener:
        server.run(sockets=[listener])
    if failures:
        raise failures[0] if isinstance(failures[0], TinyserveError) else TinyserveError(str(failures[0]))
    return 128 + signal.SIGINT if server.interrupted else 0


def listens_on_loopback(host: str) -> bool:
    """Whether a server that listens on this host is out of reach for other machines: on 0.0.0.0 it is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises UserError for an address that is taken, or none of this machine."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # asyncio sets TCP_NODELAY only if the protocol is given; without it a token waits for 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        # Windows takes SO_REUSEADDR as leave to share a port that another server listens at.
        reuse = "SO_REUSEADDR" if sys.platform != "win32" else "SO_EXCLUSIVEADDRUSE"
        listener.setsockopt(socket.SOL_SOCKET, getattr(socket, reuse), 1)
        listener.bind(address[:2])
        listener.listen(512)
        return listener
    except socket.gaierror:
        raise UserError(f"--host {host} is no address of this machine, nor a name of one.") from None
    except OverflowError:
        raise UserError(f"--port is {port}; it must be between 0 (any that is free) and 65535.") from None
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be served: {error.strerror or error}. Is another server running there? --port "
            "takes another, 0 any that is free."
        ) from None


def _leave(code: int) -> None:
    logger.warning("Threads are still at work after the drain timeout: the server leaves them.")
    logging.shutdown()
    os._exit(code)


class _Server(uvicorn.Server):
    """Uvicorn without re-raising the signal after shutdown, which would change the exit code."""

    interrupted = False

    def __init__(self, config: uvicorn.Config, service: Service, patience: float):
        super().__init__(config)
        self._service, self._patience = service, patience

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        handled = [signal.SIGTERM, signal.SIGINT]
        if sys.platform == "win32":
            handled.append(signal.SIGBREAK)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)  # threads included
        self.should_exit, self.interrupted = True, sig == signal.SIGINT
        # Python waits for the threads of its pools; one that is at work on somebody's grammar keeps no promise of ours.
        watch = threading.Timer(self._patience, _leave, [128 + sig if self.interrupted else 0])
        watch.daemon = True
        watch.start()
        self._service.is_draining = True  # until its sockets are closed, a moment later
        logger.warning("Finishing what runs; once more stops at once.")
