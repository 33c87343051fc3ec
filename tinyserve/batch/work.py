"""Who answers a job's rows, a model in this process or a server, and the worker that has them answered shard by shard.

The model is asked through the server's own application, so that a batch answers what the server would.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from tinyserve.batch.job import Counts, Job, Journal, new_worker_name, record_fingerprint, writing
from tinyserve.batch.rows import Outcome, Request, RowError, RowOptions, Rows, rows_of
from tinyserve.batch.shards import LONGEST_LINE, Row, Shard
from tinyserve.engine_options import EngineOptions
from tinyserve.errors import TinyserveError, UserError
from tinyserve.progress import Progress
from tinyserve.server.options import ServeOptions

if TYPE_CHECKING:
    from httpx2 import AsyncClient, Response

SERVER_CONCURRENCY = 32  # rows that a server has at once
SERVER_PATIENCE, OWN_PATIENCE = 600.0, 60.0  # seconds of a row that is always refused, after which the job stops
ANSWER_SECONDS = 3600.0  # without a byte: behind a long queue
MOST_FAILURES = 20  # that are all there is, after which the job stops
SYNC_SECONDS = 1.0
OPEN_SHARDS = 2  # while one's last rows are answered the next one fills the engine
_LATER = (429, 502, 503, 504)

OnRow = Callable[[Counts, bool], None]  # what came of some rows, and whether that was in an earlier run


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What answers: a model by its name and source, with the options of its engine; or one of a server's."""

    name: str | None = None
    source: str | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    tool_format: str | None = None
    server: str | None = None
    api_key: str | None = None
    max_concurrency: int | None = None


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """How many workers there are, on a Ray cluster: one of our own, or that of an address."""

    least: int = 1
    most: int = 1
    address: str | None = None
    no_ray_auth: bool = False


@dataclass(frozen=True)
class Model:
    """What answers, once it is there. `chats`: it has a chat template. `fingerprint`: of the bits that it computes."""

    client: "AsyncClient"
    name: str
    chats: bool
    fingerprint: str | None
    concurrency: int
    patience: float  # seconds
    retries: int  # of what the one who answers takes for a mistake of its own

    async def ask(self, request: Request) -> tuple[int, dict[str, Any]]:
        """A response's status and body. What is refused for now is asked again.

        Raises TinyserveError where nothing else would come of other rows, UserError where it is the key.
        """
        import httpx2

        body = json.dumps({"model": self.name, **request.body}).encode()
        waited = 0.0
        for attempt in count():
            try:
                response = await self.client.post(
                    request.path, content=body, headers={"Content-Type": "application/json"}
                )
            except httpx2.TransportError as error:
                problem, wait = f"nothing answers ({str(error) or type(error).__name__})", 0.0
            else:
                status = response.status_code
                if status not in _LATER and (status != 500 or attempt >= self.retries):
                    return status, self._body(response)
                problem, wait = _sentence(response), _retry_after(response)
            wait = wait or min(0.5 * 2**attempt, 30.0)
            if waited + wait > self.patience or "engine_dead" in problem:
                raise TinyserveError(
                    f"{self.client.base_url.host or self.name} answers no more: {problem}. What is answered is kept: "
                    "run the same command again."
                )
            waited += wait
            await asyncio.sleep(wait)
        raise AssertionError

    def _body(self, response: "Response") -> dict[str, Any]:
        if response.status_code in (401, 403):
            raise UserError(f"The server refuses: {_sentence(response)}. Give --api-key, or another one.")
        try:
            body = response.json()
        except ValueError:
            body = None
        if isinstance(body, dict):
            return body
        if response.status_code == 200:
            raise UserError(f"{self.client.base_url} sends no JSON: is it an OpenAI-compatible server?")
        return {"error": {"message": f"{response.status_code} {response.reason_phrase}".strip()}}


@asynccontextmanager
async def opened_model(options: ModelOptions, progress: Progress) -> AsyncIterator[Model]:
    """Load the model, or find it at its server; raises the errors of LLM, and those of Client."""
    opening = _at_server(options) if options.server is not None else _in_process(options, progress)
    async with opening as model:
        yield model


@asynccontextmanager
async def _in_process(options: ModelOptions, progress: Progress) -> AsyncIterator[Model]:
    import httpx2

    from tinyserve.server.app import create_app
    from tinyserve.server.guards import Admission
    from tinyserve.server.pool import pool_of

    assert options.name is not None and options.source is not None
    concurrency = options.max_concurrency or 2 * options.engine.max_num_seqs
    pool = pool_of(ServeOptions(models={options.name: options.source}, engine=options.engine, max_queue=1 << 20))
    app = create_app(pool, Admission(max_body=LONGEST_LINE), tool_format=options.tool_format)
    try:
        async with pool.use(pool.default, progress=progress) as engine:
            llm = engine.llm
            fingerprint = await asyncio.to_thread(llm.fingerprint)
            chats = llm.chat_template is not None
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://", timeout=None) as client:
            yield Model(client, options.name, chats, fingerprint, concurrency, OWN_PATIENCE, 0)
    finally:
        await pool.close()


@asynccontextmanager
async def _at_server(options: ModelOptions) -> AsyncIterator[Model]:
    import httpx2

    from tinyserve.server.client import CONNECT_SECONDS, Client, connection

    assert options.server is not None
    with Client(options.server, options.api_key) as asked:
        models = {entry["id"]: entry for entry in await asyncio.to_thread(asked.models)}
    name = options.name or next(iter(models), None)
    if name is None:
        raise UserError(f"{asked.server} lists no model: name the one you mean with --model.")
    concurrency = options.max_concurrency or SERVER_CONCURRENCY
    settings = connection(options.server, options.api_key)
    settings |= {
        "base_url": asked.server,  # the rows' paths begin with /v1
        "timeout": httpx2.Timeout(CONNECT_SECONDS, read=ANSWER_SECONDS, pool=None),
        "limits": httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
    }
    async with httpx2.AsyncClient(**settings) as client:
        chats = models.get(name, {}).get("chat") is not False
        yield Model(client, name, chats, None, concurrency, SERVER_PATIENCE, 2)


def _retry_after(response: "Response") -> float:
    given = response.headers.get("Retry-After", "")
    return float(given) if given.isdecimal() else 0.0


def _sentence(response: "Response") -> str:
    try:
        error = response.json()["error"]
        return f"{error['message'].rstrip('.')} ({error['code'] or response.status_code})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{response.status_code} {response.reason_phrase}".strip()


@dataclass(frozen=True)
class Work:
    """What a worker is told, wherever it is: the job, what its rows are, and by which model they are answered."""

    job: Job
    first: Row
    rows: RowOptions
    model: ModelOptions
    any_bits: bool

    @asynccontextmanager
    async def opened(self, on_row: "OnRow", progress: Progress, run: str = "") -> "AsyncIterator[Worker]":
        """A worker with its model, of a `run` that has others. Raises UserError for other bits than those before."""
        async with opened_model(self.model, progress) as model:
            if model.fingerprint is not None:
                record_fingerprint(self.job.folder, model.fingerprint, any_bits=self.any_bits)
            options = replace(self.rows, chats=model.chats)
            rows = rows_of(self.first, options, self.job.input.files[0].path)
            yield Worker(replace(self.job, worker=new_worker_name(run)), rows, model, on_row)


class Worker:
    """Has shards answered by one model.

    `on_row` hears what comes of each row, those that were answered before among them, once. So many failures that are
    all there is end the job, unless `most_failures` is None.
    """

    def __init__(self, job: Job, rows: Rows, model: Model, on_row: OnRow, most_failures: int | None = MOST_FAILURES):
        self._job, self._rows, self._model, self._on_row = job, rows, model, on_row
        self._most_failures = most_failures
        self._slots = asyncio.Semaphore(model.concurrency)
        self._feeding = asyncio.Lock()
        self._first_failures: list[str] | None = [] if most_failures else None  # until one row is answered

    async def run(self, shards: Iterable[Shard]) -> None:
        """Answer all rows of these shards that nobody has answered. Raises TinyserveError; what is answered is kept."""
        places = asyncio.Semaphore(OPEN_SHARDS)

        async def answer(shard: Shard) -> None:
            try:
                await self.answer(shard)
            finally:
                places.release()

        with _first_error():
            async with asyncio.TaskGroup() as group:
                for shard in shards:
                    await places.acquire()
                    group.create_task(answer(shard))

    async def answer(self, shard: Shard) -> None:
        """The same for one shard; of several at once the rows of the first one come first."""
        if self._job.is_done(shard):
            self._on_row(self._job.counts(shard), True)
            return
        outcomes = await asyncio.to_thread(self._job.answered, shard)
        for outcome in outcomes.values():
            self._hear(Counts.of(outcome), True)
        known, journal = set(outcomes), self._job.open_journal(shard)
        try:
            with _first_error():
                async with asyncio.TaskGroup() as group:
                    syncing = group.create_task(self._sync(journal))
                    rows = list[asyncio.Task[None]]()
                    async with self._feeding:
                        for row in self._job.input.rows(shard):
                            if row.number not in known:
                                await self._slots.acquire()
                                rows.append(group.create_task(self._answer(row, journal, outcomes)))
                    if rows:
                        await asyncio.wait(rows)
                    syncing.cancel()
        finally:
            with suppress(OSError):
                journal.file.close()
        await asyncio.to_thread(self._job.finish, shard, outcomes)

    async def _answer(self, row: Row, journal: Journal, outcomes: dict[int, Outcome]) -> None:
        try:
            outcome = await self._outcome(row)
        finally:
            self._slots.release()
        with writing(self._job.folder):
            journal.add(row.number, outcome)
        outcomes[row.number] = outcome
        self._stop_if_all_fail(outcome)
        self._hear(Counts.of(outcome), False)

    async def _outcome(self, row: Row) -> Outcome:
        try:
            path, body = self._rows.request(row)
        except RowError as error:
            return self._rows.failed(row, str(error))
        try:
            status, response = await self._model.ask(Request(path, body))
        except (TinyserveError, asyncio.CancelledError):
            raise
        except Exception as error:  # a mistake of ours that one row brings about
            return self._rows.failed(row, f"internal error ({type(error).__name__}: {error})")
        return self._rows.answered(row, path, status, response)

    def _hear(self, counts: Counts, is_old: bool) -> None:
        if counts.failed < counts.rows:
            self._first_failures = None
        self._on_row(counts, is_old)

    def _stop_if_all_fail(self, outcome: Outcome) -> None:
        if self._first_failures is None or not outcome.is_failure:
            return
        self._first_failures.append(_reason(outcome.fields))
        if len(self._first_failures) == self._most_failures:
            self._job.forget_journals_of_this_worker()
            raise UserError(
                f"The first {self._most_failures} rows all failed, and none is kept. The first one: "
                f"{self._first_failures[0]}"
            )

    async def _sync(self, journal: Journal) -> None:
        while True:
            await asyncio.sleep(SYNC_SECONDS)
            with writing(self._job.folder):
                await asyncio.to_thread(journal.sync)


def _reason(fields: dict[str, Any]) -> str:
    """Why a row failed, in either kind of rows."""
    error = fields.get("error") or fields["response"]["body"].get("error")
    return str(error.get("message") if isinstance(error, dict) else error)


@contextmanager
def _first_error() -> Iterator[None]:
    """Raise the first error of a group in its place, whatever groups are in it."""
    try:
        yield
    except BaseExceptionGroup as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None
