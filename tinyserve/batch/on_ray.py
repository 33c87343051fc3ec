"""The shards of a batch on a pool of workers, which is Ray Data's: Ray says which worker has which shard.

A worker that dies is started again, and what it was at is handed to another, which finds its journals.
"""

import asyncio
import logging
import pickle
import threading
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

from tinyserve.batch.counts import BatchProgress, Counts, OnProgress
from tinyserve.batch.job import TEMPORARY, Job
from tinyserve.batch.journal import new_worker_name
from tinyserve.batch.shards import Shard
from tinyserve.batch.work import OPEN_SHARDS, Work, WorkerOptions
from tinyserve.cluster import Session, connect
from tinyserve.errors import TinyserveError, UserError
from tinyserve.progress import Progress, silent
from tinyserve.server.heaps import keep_heaps_small

_TICK_SECONDS = 1.0  # between two looks at the journals
_LOOK_SECONDS = 60.0
_MOST_TRIES = 4  # of a shard in one run, after which its workers have died often enough


class ShardWorker:
    """An actor of Ray Data's: a model, and two shards at a time."""

    def __init__(self, work: Work, run: str):
        keep_heaps_small()
        self._work, self._run = work, run
        self._shards = {shard.number: shard for shard in work.job.input.shards}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="tinyserve-batch", daemon=True).start()
        self._stack = AsyncExitStack()  # the process ends it
        opening = self._stack.enter_async_context(work.opened(lambda counts, is_old: None, silent, run))
        self._opening = asyncio.run_coroutine_threadsafe(opening, self._loop)  # an error here would be tried again

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Have the shard of this number answered. What ends the job is returned: of an error Ray makes pages."""
        try:
            self._answer(self._shards[row["shard"]])
        except TinyserveError as error:
            return {**row, "error": pickle.dumps(error)}
        return {**row, "error": None}

    def _answer(self, shard: Shard) -> None:
        worker = self._opening.result()
        if (tries := self._work.job.count_journals(shard, self._run)) >= _MOST_TRIES:
            raise TinyserveError(
                f"Rows {shard.first + 1} to {shard.first + shard.num_rows} were begun {tries} times, and each time the "
                "worker died: is its memory enough? What is answered is kept: run the same command again."
            )
        asyncio.run_coroutine_threadsafe(worker.answer(shard), self._loop).result()


def answer(
    work: Work, options: WorkerOptions, said: BatchProgress, on_progress: OnProgress, progress: Progress
) -> None:
    """Have all shards answered that are not, while `on_progress` hears how far they are.

    Raises the errors of `connect` and of workers, and UserError where a node does not see the files.
    """
    threads = work.model.engine.num_threads
    own_cores = options.most * threads if threads else None
    with connect(options.address, no_ray_auth=options.no_ray_auth, cores=own_cores, progress=progress) as session:
        import ray
        from ray.data import ActorPoolStrategy, DataContext, from_items

        work = _placed(_absolute(work), session, options)
        _check_visible(session, work.job)
        work.forget()  # here, for a worker may begin when others have answered
        work = replace(work, restart=False)
        progress(f"starting {options.least} worker{'s' * (options.least > 1)}", 0, 0)
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of its plans
        DataContext.get_current().enable_progress_bars = False
        missing = [shard for shard in work.job.input.shards if work.job.done(shard) is None]
        if not missing:
            return
        shards = from_items([{"shard": shard.number} for shard in missing], override_num_blocks=len(missing))
        answered = shards.map(
            ShardWorker,
            fn_constructor_args=(work, new_worker_name()),
            num_cpus=work.model.engine.num_threads,
            compute=ActorPoolStrategy(
                min_size=min(options.least, len(missing)),
                max_size=options.most,
                max_tasks_in_flight_per_actor=OPEN_SHARDS,
                max_concurrent_calls_per_actor=OPEN_SHARDS,
                enable_true_multi_threading=True,  # both wait for one event loop
            ),
        )
        with _watched(work.job, said, on_progress):
            try:
                for row in answered.iter_rows():
                    if row["error"] is not None:
                        raise pickle.loads(row["error"])
            except ray.exceptions.RayError as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                raise TinyserveError(f"A worker failed: {lines[-1].rstrip('.')}. What is answered is kept.") from error


def _absolute(work: Work) -> Work:
    """The same for processes that have another working directory."""
    job, model = work.job, work.model
    files = tuple(replace(file, path=str(Path(file.path).absolute())) for file in job.input.files)
    job = replace(job, output=job.output.absolute(), input=replace(job.input, files=files))
    if model.source is not None and Path(model.source).exists():
        model = replace(model, source=str(Path(model.source).absolute()))
    return replace(work, job=job, model=model)


def _placed(work: Work, session: Session, options: WorkerOptions) -> Work:
    """The same with the threads and the cache of each worker; raises UserError where there is no room for the least."""
    engine, nodes = work.model.engine, session.nodes
    there = -(-options.most // len(nodes))  # at most so many workers of a node
    threads = engine.num_threads or max(1, min(node.cores for node in nodes) // there)
    room = sum(node.cores // threads for node in nodes)
    if room < options.least:
        cores = ", ".join(str(node.cores) for node in nodes)
        raise UserError(
            f"{options.least} workers of {threads} threads do not fit: the nodes have {cores} cores. Lower "
            "--workers or --threads."
        )
    # By default each would plan for half of what is free.
    cache = engine.kv_cache_memory or min(node.free_memory for node in nodes) // (2 * there)
    return replace(work, model=replace(work.model, engine=replace(engine, num_threads=threads, kv_cache_memory=cache)))


def _check_visible(session: Session, job: Job) -> None:
    """Raises UserError that names a node which does not see the input, or the job's folder."""
    if session.is_own:
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0)(unseen)
    files = {file.path: file.size for file in job.input.files}
    token = job.folder / TEMPORARY / new_worker_name()  # as no other folder of this name has it
    token.write_text(token.name, "ascii")
    files[str(token)] = len(token.name)
    asked = {
        node.host: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(files)
        for node in session.nodes
    }
    for host, answer in asked.items():
        if (path := ray.get(answer, timeout=_LOOK_SECONDS)) is not None:
            raise UserError(
                f"The node {host} does not see {path} as it is here: put input and output where all nodes see them, "
                "under the same names."
            )


def unseen(files: Mapping[str, int]) -> str | None:
    """The first of these files that is not there with so many bytes."""
    for path, size in files.items():
        try:
            if Path(path).stat().st_size != size:
                return path
        except OSError:
            return path
    return None


@contextmanager
def _watched(job: Job, said: BatchProgress, on_progress: OnProgress) -> Iterator[None]:
    """Read now and then in the job's folder how far its workers are, and tell."""
    started, before, known = monotonic(), job.count(), dict[int, Counts]()
    ended = threading.Event()

    def tell() -> None:
        now = job.count(known)
        said.rows, said.failed = now.rows, now.failed
        said.prompt_tokens = now.prompt_tokens - before.prompt_tokens
        said.output_tokens = now.output_tokens - before.output_tokens
        said.seconds = monotonic() - started
        on_progress(said)

    def watch() -> None:
        while not ended.wait(_TICK_SECONDS):
            tell()

    watching = threading.Thread(target=watch, name="tinyserve-batch-progress", daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
    tell()
