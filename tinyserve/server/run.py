"""A server as a process: its socket, its signals, its end.

The first SIGTERM or SIGINT lets what runs be finished and refuses what is new; a second one stops at once.
"""

import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import uvicorn

from tinyserve.checkpoints.model_ref import ModelRef
from tinyserve.errors import TinyserveError, UserError
from tinyserve.server.app import MAX_BODY, create_app
from tinyserve.server.guards import MAX_HEADERS
from tinyserve.server.pool import ModelPool
from tinyserve.server.state import State
from tinyserve.text.tools import format_named
from tinyserve.text.validation import check_options

logger = logging.getLogger("tinyserve.server")

IDLE = 75  # seconds for which an idle connection is kept: longer than nginx's 60, or it may speak to a closed one


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How to serve. `models` maps the names that clients give to what LLM takes; the rest is as in the command."""

    models: dict[str, str]
    llm_options: dict[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Sequence[str] = ()
    no_auth: bool = False
    cors_origins: Sequence[str] = ()
    memory: int | None = None  # bytes; by default four fifths of what is free
    tool_format: str | None = None
    max_queue: int = 128
    max_body: int = MAX_BODY
    drain_timeout: float = 30.0
    on_listen: Callable[[str], None] = lambda url: None  # hears the address, once clients may connect


def serve(options: ServeOptions) -> int:
    """Serve until a signal comes; returns the exit code. Raises UserError for options that would be unsafe or wrong."""
    if not (options.api_keys or options.no_auth or is_loopback(options.host)):
        raise UserError(
            f"--host {options.host} lets other machines in: set an API key (TINYSERVE_API_KEY, or --api-key-file), or "
            "say --no-auth if everybody may use it."
        )
    _check(options)
    listener = _listen(options.host, options.port)
    failures: list[Exception] = []

    def fail(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    host, port = listener.getsockname()[:2]
    # Where nobody is asked for a key, the name that a browser was given is all that tells who sent it here.
    hosts = (
        ("localhost", "127.0.0.1", "::1", options.host) if is_loopback(options.host) and not options.api_keys else ()
    )
    app = create_app(
        _pool(options),
        api_keys=options.api_keys,
        hosts=hosts,
        cors_origins=options.cors_origins,
        max_body=options.max_body,
        tool_format=options.tool_format,
        on_failure=fail,
    )
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="on", access_log=False, log_config=None, server_header=False,
        h11_max_incomplete_event_size=2 * MAX_HEADERS, timeout_keep_alive=IDLE,
        timeout_graceful_shutdown=max(1, round(options.drain_timeout)),
    )  # fmt: skip
    server = _Server(config, app.state.server)
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{port}"
    options.on_listen(url)
    with listener:
        server.run(sockets=[listener])
    if failures:
        raise failures[0] if isinstance(failures[0], TinyserveError) else TinyserveError(str(failures[0]))
    return 128 + signal.SIGINT if server.interrupted else 0


def _check(options: ServeOptions) -> None:
    """Raise UserError for a mistake that would be found only when a model is loaded."""
    from tinyserve.model_runner import resolve_kv_cache_dtype
    from tinyserve.models.matrix import resolve_dtype

    if options.tool_format is not None:
        format_named(options.tool_format)
    llm = options.llm_options
    numbers = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory", "num_threads")
    check_options({}, **{name: llm[name] for name in numbers if name in llm})
    resolve_kv_cache_dtype(llm.get("kv_cache_dtype", "auto"), resolve_dtype(llm.get("dtype", "auto")))
    for source in options.models.values():
        ModelRef.parse(source)  # whether there is such a repository, only the Hub knows


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # asyncio lets small pieces go at once where a socket says that it is TCP; else a token waits for 40 ms.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address[:2])
        listener.listen(512)
        return listener
    except socket.gaierror:
        raise UserError(f"--host {host} is no address of this machine, nor a name of one.") from None
    except OverflowError:
        raise UserError(f"--port is {port}; it must be between 0 (any that is free) and 65535.") from None
    except OSError as error:
        raise UserError(
            f"{host}:{port} cannot be served: {os.strerror(error.errno or 0)}. Is another server running there? --port "
            "takes another, 0 any that is free."
        ) from None


def _pool(options: ServeOptions) -> ModelPool:
    from tinyserve.model_runner import available_memory

    memory = options.memory if options.memory is not None else available_memory() * 4 // 5
    if memory <= 0:
        raise TinyserveError("No memory is free.")
    llm_options = dict(options.llm_options)
    if (len(options.models) > 1 or options.memory) and llm_options.get("kv_cache_memory") is None:
        # A model would plan for half of all that is free.
        llm_options["kv_cache_memory"] = memory // (2 * len(options.models))
    return ModelPool(options.models, llm_options, memory, options.max_queue)


class _Server(uvicorn.Server):
    """Uvicorn with its own end: it would pass the signal on, and die of it with another exit code."""

    interrupted = False

    def __init__(self, config: uvicorn.Config, state: State):
        super().__init__(config)
        self._state = state

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        handled = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)  # whoever says it twice does not want to wait for threads, either
        self.should_exit, self.interrupted = True, sig == signal.SIGINT
        self._state.is_draining = True  # until its sockets are closed, a moment later
        logger.warning("Finishing what runs; once more stops at once.")
