"""A batch as a whole: its input read, its folder held, its model opened, its rows answered, its output put together.

`run_batch` is for Python programs; `tinyserve batch` calls what is behind it.
"""

import asyncio
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from time import monotonic
from typing import Any

from tinyserve import __version__
from tinyserve.batch.counts import BatchProgress, OnProgress
from tinyserve.batch.job import Job, folder_of, opened
from tinyserve.batch.manifest import Manifest
from tinyserve.batch.rows import RowOptions, looks_asked, rows_of
from tinyserve.batch.shards import JSONL, KINDS, PARQUET, Input, Row, read_input
from tinyserve.batch.work import ModelOptions, Work, WorkerOptions
from tinyserve.engine_options import EngineOptions
from tinyserve.errors import UserError
from tinyserve.progress import Progress, silent
from tinyserve.sampling_params import SamplingParams
from tinyserve.server.client import request_fields
from tinyserve.text.chat_template import read_template

_TICK_SECONDS = 0.2
MOST_WORKERS = 4096
LONGEST_NAME = 255  # bytes


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What a batch is told."""

    inputs: Sequence[str]
    output: str
    model: ModelOptions
    rows: RowOptions = field(default_factory=RowOptions)
    restart: bool = False
    any_bits: bool = False
    workers: WorkerOptions | None = None  # on Ray; else one, in this process
    rows_per_shard: int | None = None  # by default as many as there are rows


@dataclass(frozen=True)
class BatchReport:
    """What came of a batch, over all its runs, and the seconds of this one; `resumed` rows were answered before it."""

    output: Path
    rows: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    resumed: int
    seconds: float


def run_batch(
    inputs: str | PathLike[str] | Sequence[str | PathLike[str]],
    output: str | PathLike[str],
    model: str | PathLike[str] | None = None,
    sampling_params: SamplingParams | None = None,
    *,
    server: str | None = None,
    api_key: str | None = None,
    prompt_column: str | None = None,
    messages_column: str | None = None,
    system: str | None = None,
    raw: bool = False,
    seed: int = 0,
    restart: bool = False,
    any_bits: bool = False,
    max_concurrency: int | None = None,
    workers: int | tuple[int, int] = 1,
    address: str | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> BatchReport:
    """Answer all rows of JSONL or Parquet files; run again with the same arguments, it goes on where it ended.

    `inputs` are files, folders and patterns; `output` is a file, or a folder of parts. A `model` is loaded here with
    the options of LLM, or asked at a `server`; `workers`, a number or the least and the most, are on a Ray cluster, one
    of our own or that of an `address`. Rows have OpenAI's batch lines, or a column with a prompt or messages.
    A row that fails is a row with an error. Raises UserError for input that cannot be read and a job begun otherwise,
    TinyserveError where nothing more can be answered or written: what is answered is kept.
    """
    if server is None and model is None:
        raise UserError("Neither a model nor a server is given: name one of them.")
    given = [inputs] if isinstance(inputs, str | PathLike) else list(inputs or ())
    if not given or not all(isinstance(one, str | PathLike) for one in given):
        raise UserError(f"inputs is {inputs!r:.80}; it must be a file, a folder or a pattern, or a list of them.")
    if not isinstance(output, str | PathLike) or not str(output):
        raise UserError(f"output is {output!r:.80}; it must be a file or a folder.")
    if sampling_params is not None and not isinstance(sampling_params, SamplingParams):
        raise UserError(f"sampling_params is {sampling_params!r:.80}; it must be a SamplingParams.")
    if max_concurrency is not None and (type(max_concurrency) is not int or max_concurrency < 1):
        raise UserError(f"max_concurrency is {max_concurrency!r:.80}; it must be a whole number of at least 1.")
    if server is not None and options:
        raise UserError(f"{next(iter(options))} is the server's to decide: leave it out, or leave out server.")
    name = str(model) if model is not None else None
    body = _body_of(sampling_params)
    batch = BatchOptions(
        inputs=[str(one) for one in given],
        output=str(output),
        model=ModelOptions(
            name=name,
            source=name,
            engine=EngineOptions.of(options),
            server=server,
            api_key=api_key,
            max_concurrency=max_concurrency,
        ),
        rows=RowOptions(
            body=body, prompt_column=prompt_column, messages_column=messages_column, system=system, raw=raw, seed=seed
        ),
        restart=restart,
        any_bits=any_bits,
        workers=worker_options(workers, address),
    )
    return run(batch, on_progress or (lambda progress: None))


def worker_options(
    workers: int | tuple[int, int], address: str | None, *, no_ray_auth: bool = False
) -> WorkerOptions | None:
    """Workers on a cluster; None for one in this process. Raises UserError for numbers of workers that cannot be."""
    least, most = (workers, workers) if isinstance(workers, int) else workers
    if not 1 <= least <= most <= MOST_WORKERS:
        raise UserError(
            f"workers is {workers!r}; it must be a number from 1 to {MOST_WORKERS}, or two of them as (2, 16)."
        )
    if most == 1 and address is None:
        return None
    return WorkerOptions(least=least, most=most, address=address, no_ray_auth=no_ray_auth)


def run(options: BatchOptions, on_progress: OnProgress, progress: Progress = silent) -> BatchReport:
    """The same with options as they are read from a command line; `progress` hears of reading and of loading."""
    started = monotonic()
    output = Path(options.output)
    _check_name(output)
    if output.is_symlink():
        output = output.resolve()  # the file that it leads to is written anew, and not the link
    given = read_input(options.inputs, progress, options.rows_per_shard)
    _check_output(output, options.output, given)
    first = _first_row(given, options.rows)
    job = Job(output, given, rows_of(first, options.rows, given.files[0].path).merges)
    _check_kind(job)
    manifest = _manifest(options, given)
    with opened(output, manifest, restart=options.restart) as is_open:
        resumed = 0
        if is_open:
            resumed = 0 if options.restart else job.count().rows
            work = Work(job, manifest, first, options.rows, options.model, options.any_bits, options.restart)
            said = BatchProgress(given.num_rows, resumed=resumed)
            if options.workers is None:
                _in_a_loop(_answer_here(work, said, on_progress, progress))
            else:
                from tinyserve.batch.on_ray import answer

                answer(work, options.workers, said, on_progress, progress)
        counts = job.complete() if is_open else job.read_counts()
    return BatchReport(
        output, **vars(counts), resumed=resumed if is_open else counts.rows, seconds=monotonic() - started
    )


def _in_a_loop(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    # A notebook has a loop in this thread; whoever interrupts it waits here, and the work is cancelled there.
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait({task})), name="tinyserve-batch")
    thread.start()
    try:
        thread.join()
    except BaseException:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise
    finally:
        loop.close()
    task.result()


async def _answer_here(work: Work, said: BatchProgress, on_progress: OnProgress, progress: Progress) -> None:
    """Have all shards answered by one model in this process, or by a server."""
    async with work.opened(said.add, progress) as worker, _ticking(said, on_progress):
        await worker.run(work.job.input.shards)


@asynccontextmanager
async def _ticking(said: BatchProgress, on_progress: OnProgress) -> AsyncIterator[None]:
    """Tell how far a batch is, some times a second, and at its end."""
    started = monotonic()

    def tell() -> None:
        said.seconds = monotonic() - started
        on_progress(said)

    async def tick() -> None:
        while True:
            tell()
            await asyncio.sleep(_TICK_SECONDS)

    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()
        tell()


def _first_row(given: Input, options: RowOptions) -> Row:
    """The first row that asks something, which says what the others are; raises UserError where none can be read."""
    rows = list(given.rows(given.shards[0]))
    fit = (row for row in rows if row.error is None)
    first = next(
        (row for row in fit if looks_asked(row, options)), next((row for row in rows if not row.error), rows[0])
    )
    if first.error is not None:
        raise UserError(f"{given.files[0].path}, row {first.number + 1}: {first.error}")
    return first


def _check_name(output: Path) -> None:
    """Raises UserError for a name that is none together with that of the folder beside it."""
    length = len(os.fsencode(folder_of(output).name))
    if length > LONGEST_NAME:
        raise UserError(
            f"The name {output.name:.40}... is too long: with that of the folder beside it {length} bytes, and file "
            f"systems take {LONGEST_NAME}."
        )


def _check_output(output: Path, told: str, given: Input) -> None:
    """Raises UserError for an output that is part of the input."""
    if output.suffix not in KINDS and output.suffix and not output.is_dir() and not told.endswith(("/", os.sep)):
        raise UserError(f"{output} is neither .jsonl nor .parquet, nor a folder: name one of these.")
    for file in given.files:
        path = Path(file.path).resolve()
        if output.resolve() in (path, path.parent):
            raise UserError(f"{output} is where {file.path} lies, which is read: name another output.")


def _check_kind(job: Job) -> None:
    """Raises UserError for rows that cannot be written as the output wants them."""
    if job.kind == PARQUET and job.input.kind == JSONL:
        raise UserError(f"{job.output} is Parquet, and the input JSON lines, whose rows have no types: write .jsonl.")
    if job.kind == PARQUET and not job.merges:
        raise UserError(f"{job.output} is Parquet, and OpenAI's batch lines are JSON: write .jsonl.")


def _manifest(options: BatchOptions, given: Input) -> Manifest:
    """All that decides what is answered, and where rows are cut."""
    model, rows = options.model, options.rows
    engine = model.engine
    template = str(engine.chat_template) if engine.chat_template is not None else None
    if template is not None:
        template = hashlib.blake2b(read_template(template)[0].encode(), digest_size=8).hexdigest()
    settings = {
        "version": __version__,
        "model": model.name if model.source in (None, model.name) else f"{model.name}={model.source}",
        "server": model.server,
        "dtype": engine.dtype,
        "kv_cache_dtype": engine.kv_cache_dtype,
        "max_model_len": engine.max_model_len,
        "load_format": engine.load_format,
        "chat_template": template,
        "tool_format": model.tool_format,
        "prompt_column": rows.prompt_column,
        "messages_column": rows.messages_column,
        "system": rows.system,
        "raw": rows.raw,
        "seed": rows.seed,
        **rows.body,
        "rows_per_shard": given.shards[0].num_rows,
    }
    return Manifest([asdict(file) for file in given.files], settings)


def _body_of(params: SamplingParams | None) -> dict[str, Any]:
    """Parameters as a body's fields; raises UserError for one that no plain row has a place for."""
    if params is None:
        return {}
    given = {name: getattr(params, name) for name in params.rows}
    for name, row in params.rows.items():
        if (row.http is None and name != "structured_outputs" and given[name] != row.default) or (
            name in ("n", "best_of") and given[name] not in (1, None)
        ):
            raise UserError(f"{name} is {given[name]!r}, and a row has one answer: leave it out, or use batch lines.")
    named = {name: value for name, value in given.items() if params.rows[name].http or name == "structured_outputs"}
    return request_fields({name: list(value) if isinstance(value, tuple) else value for name, value in named.items()})
