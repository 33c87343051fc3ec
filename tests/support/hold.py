"""An engine that waits: a tiny model's whole answer takes less time than a test needs to do something meanwhile."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tinyserve import LLM


class Held(NamedTuple):
    started: threading.Event  # the engine waits
    release: threading.Event  # it may go on, and waits no more


@contextmanager
def hold(llm: LLM, after: int = 0) -> Iterator[Held]:
    """Let the engine wait before a step, the next or that after so many, until it is released or the block is left."""
    runner, held, steps = llm.engine.runner, Held(threading.Event(), threading.Event()), itertools.count()
    execute = runner.execute

    def waiting(scheduled: Any) -> Any:
        if next(steps) >= after:
            held.started.set()
            assert held.release.wait(120)
        return execute(scheduled)

    runner.execute = waiting  # type: ignore[method-assign]
    try:
        yield held
    finally:
        held.release.set()
        runner.execute = execute  # type: ignore[method-assign]
