"""How a server is told to serve; imports nothing that only a server needs, so that a command can show defaults."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tinyserve.engine_options import EngineOptions

API_KEY_VARIABLE = "TINYSERVE_API_KEY"  # in the environment of a server, and of whoever asks one


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How to serve. `models` maps the names that clients give to models, each of which has an engine of its own."""

    models: dict[str, str]
    engine: EngineOptions = field(default_factory=EngineOptions)
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Sequence[str] = ()
    no_auth: bool = False
    cors_origins: Sequence[str] = ()
    memory: int | None = None  # bytes; by default four fifths of what is free
    tool_format: str | None = None
    strict: bool = False  # refuse fields that are not built, also those that an answer is as good without
    access_log: bool = False  # log a line for each request
    max_queue: int = 128  # answers that may wait for each model
    max_body: int = 16_000_000  # bytes: a context of 128k tokens is half a megabyte of text
    drain_timeout: float = 30.0  # seconds that SIGTERM waits for what runs
    on_listen: Callable[[str], None] = lambda url: None  # hears the address, once clients may connect
