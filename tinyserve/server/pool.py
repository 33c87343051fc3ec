"""The models of a server: loaded on demand within a memory budget, with a bounded queue for each.

Knows engines and their sizes; nothing of HTTP beyond the errors that it raises.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Thread
from typing import TypeVar

from tinyserve.async_engine import AsyncEngine
from tinyserve.engine_options import EngineOptions
from tinyserve.errors import TinyserveError
from tinyserve.llm import LLM
from tinyserve.progress import Progress, size
from tinyserve.server.errors import ApiError
from tinyserve.server.heaps import collect_unloaded, keep_loaded
from tinyserve.server.options import ServeOptions
from tinyserve.tensor.cgroups import available_memory

logger = logging.getLogger("tinyserve.server")

T = TypeVar("T")


@dataclass(eq=False)
class ServedModel:
    """A model under the name that clients give it, whether or not it is in memory."""

    name: str
    source: str  # a preset, a repo id, a folder or a file
    engine: AsyncEngine | None = None
    nbytes: int = 0  # weights and cache, while it is in memory
    num_open: int = 0  # answers in progress or waiting
    last_used: float = 0.0
    seconds: float = 1.0  # per answer, an exponential moving average
    loading: "asyncio.Task[None] | None" = None
    listeners: list[Progress] = field(default_factory=list)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def llm(self) -> LLM | None:
        return self.engine.llm if self.engine is not None else None


class ModelPool:
    """Hands out engines, each with these `options`; `max_queue` answers may wait for each model beside those that run.

    `memory` is in bytes: where a model does not fit beside the others, idle ones make room, the least recently used
    first. One model loads at a time.
    """

    def __init__(self, models: dict[str, str], options: EngineOptions, memory: int, max_queue: int):
        self.models = {name: ServedModel(name, source) for name, source in models.items()}
        self.options, self.memory, self.max_queue = options, memory, max_queue
        self.max_num_seqs = options.max_num_seqs
        self._load_lock = asyncio.Lock()

    @property
    def default(self) -> ServedModel:
        """The model of requests that name none."""
        return next(iter(self.models.values()))

    def find(self, name: str | None) -> ServedModel:
        """The model of this name; raises ApiError 404 that lists all names."""
        if name is None:
            return self.default
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(
                404, f"There is no model {name!r:.80}: this server has {known}.", param="model", code="model_not_found"
            )
        return self.models[name]

    def dead(self) -> str | None:
        """The reason if an engine has died, after which nothing is served."""
        for model in self.models.values():
            if model.engine is not None and (error := model.llm and model.llm.thread.dead_error):
                return f"The engine of {model.name} is dead: {error}"
        return None

    @asynccontextmanager
    async def use(
        self, model: ServedModel, answers: int = 1, progress: Progress | None = None
    ) -> AsyncIterator[AsyncEngine]:
        """The engine of a model, which is loaded first if need be and not evicted meanwhile; `progress` is of the load.

        Raises ApiError: 400 for more answers than it ever takes, 429 if its queue is full, 503 if there is no memory to
        load it.
        """
        limit = self.max_num_seqs + self.max_queue
        if answers > limit:
            raise ApiError(
                400,
                f"The request asks for {answers} answers, and {model.name} takes {limit} at a time: ask for fewer, or "
                "raise --max-queue.",
                param="n",
                code="too_many_answers",
            )
        if model.num_open and model.num_open + answers > limit:
            raise ApiError(
                429,
                f"{model.name} has {model.num_open} answers to give and takes {limit} at a time: ask again later.",
                code="queue_full",
                retry_after=self._retry_after(model),
            )
        start = time.monotonic()
        model.num_open += answers
        try:
            if model.engine is None:
                await self._load(model, progress)
            assert model.engine is not None
            yield model.engine
            model.seconds += 0.1 * (time.monotonic() - start - model.seconds)
        finally:
            model.num_open -= answers
            model.last_used = time.monotonic()

    def _retry_after(self, model: ServedModel) -> int:
        """An estimate of the seconds until the queue has room, from how long answers took."""
        return max(
            1, min(60, math.ceil(model.seconds * max(1, model.num_open - self.max_num_seqs) / self.max_num_seqs))
        )

    async def _load(self, model: ServedModel, progress: Progress | None) -> None:
        if progress is not None:
            model.listeners.append(progress)
        if model.loading is None:
            model.loading = asyncio.create_task(self._load_locked(model))
        task = model.loading
        try:
            await asyncio.shield(task)  # a client that disconnects does not cancel the load for others
        finally:
            if progress is not None:
                model.listeners.remove(progress)

    async def _load_locked(self, model: ServedModel) -> None:
        try:
            async with self._load_lock:
                loop = asyncio.get_running_loop()

                def tell(stage: str, done: int, total: int) -> None:
                    for listener in list(model.listeners):
                        listener(stage, done, total)

                def reserve(needed: int) -> None:
                    asyncio.run_coroutine_threadsafe(self._make_room(model, needed), loop).result()

                def report(stage: str, done: int, total: int) -> None:
                    if stage.startswith("compile") and done == 1:
                        logger.info(
                            "%s: kernels are compiled for this processor, which takes a minute once", model.name
                        )
                    if stage.startswith("download") and done == 0:
                        logger.info("%s: %s, %s", model.name, stage, size(total))
                    loop.call_soon_threadsafe(tell, stage, done, total)

                start = time.monotonic()
                llm = await in_thread(
                    partial(LLM, model.source, progress=report, reserve=reserve, **self.options.as_dict())
                )
                model.engine = AsyncEngine(llm)
                keep_loaded()
                logger.info("%s is loaded in %.1f s, %s", model.name, time.monotonic() - start, size(model.nbytes))
        except Exception as error:
            model.nbytes = 0
            logger.error("%s could not be loaded: %s", model.name, error)
            raise
        finally:
            model.loading = None

    async def _make_room(self, model: ServedModel, needed: int) -> None:
        """Reserve bytes for a model, evicting idle ones; raises ApiError if that is not enough."""
        if needed > self.memory:
            raise ApiError(
                503,
                f"{model.name} needs {size(needed)} and the server may use {size(self.memory)}: give it a smaller "
                "--kv-cache-memory, or more --memory.",
                code="model_too_large",
            )
        while sum(other.nbytes for other in self.models.values()) + needed > self.memory:
            idle = [other for other in self.models.values() if other.engine is not None and not other.num_open]
            if not idle:
                busy = ", ".join(other.name for other in self.models.values() if other.engine is not None)
                raise ApiError(
                    503,
                    f"{model.name} does not fit beside {busy}, which others are using: ask again later.",
                    code="model_does_not_fit",
                    retry_after=10,
                )
            await self._unload(min(idle, key=lambda other: other.last_used))
        model.nbytes = needed

    async def _unload(self, model: ServedModel) -> None:
        engine, model.engine, model.nbytes = model.engine, None, 0
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)
            logger.info("%s makes room for another model", model.name)
        del engine
        collect_unloaded()

    async def close(self) -> None:
        """Shut all engines down."""
        for model in self.models.values():
            if model.engine is not None:
                await asyncio.to_thread(model.engine.shutdown)


def pool_of(options: ServeOptions) -> ModelPool:
    """The pool that a server is told to have; raises TinyserveError where no memory is free."""
    memory = options.memory if options.memory is not None else available_memory() * 4 // 5
    if memory <= 0:
        raise TinyserveError("No memory is free.")
    engine = options.engine
    if (len(options.models) > 1 or options.memory) and engine.kv_cache_memory is None:
        # By default each model would plan for half of the free memory.
        engine = replace(engine, kv_cache_memory=memory // (2 * len(options.models)))
    return ModelPool(options.models, engine, memory, options.max_queue)


async def in_thread(work: Callable[[], T]) -> T:
    """The result of `work` in a daemon thread: a thread of a pool would delay the end of the process."""
    future: Future[T] = Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="tinyserve-load", daemon=True).start()
    return await asyncio.wrap_future(future)
