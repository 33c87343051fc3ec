"""Who answers a job's rows, a model in this process or a server, and the worker that has them answered shard by shard.

The model is asked through the server's own application, so that a batch answers what the server would.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from tinyserve.batch.counts import Counts, OnRow
from tinyserve.batch.disk import writing
from tinyserve.batch.job import JOURNALS, TEMPORARY, Job, clear
from tinyserve.batch.journal import Journal, new_worker_name
from tinyserve.batch.manifest import Manifest, record_fingerprint
from tinyserve.batch.rows import Outcome, Request, RowError, RowOptions, Rows, rows_of
from tinyserve.batch.shards import LONGEST_LINE, MAX_DEPTH, Row, Shard, is_deeper
from tinyserve.engine_options import EngineOptions
from tinyserve.errors import TinyserveError, UserError
from tinyserve.progress import Progress
from tinyserve.server.options import ServeOptions

if TYPE_CHECKING:
    from httpx2 import AsyncClient, Response

    from tinyserve.llm import LLM

SERVER_CONCURRENCY = 32  # rows that a server has at once
SERVER_PATIENCE, OWN_PATIENCE = 600.0, 60.0  # seconds of a row that is always refused, after which the job stops
ANSWER_SECONDS = 3600.0  # without a byte: behind a long queue
MOST_FAILURES = 20  # that are all there is, after which the job stops
SYNC_SECONDS = 1.0
OPEN_SHARDS = 2  # while one's last rows are answered the next one fills the engine
_LATER = (429, 502, 503, 504)


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

        content = json.dumps({"model": self.name, **request.body}).encode()
        headers = {"Content-Type": "application/json"}
        waited, mistakes, wait = 0.0, 0, 0.0
        for attempt in count():
            try:
                response = await self.client.post(request.path, content=content, headers=headers)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                problem, wait = f"nothing answers there ({str(error) or type(error).__name__})", 0.0
            except httpx2.RequestError as error:  # it breaks off, which may be for this row alone
                mistakes, problem, wait = mistakes + 1, f"it broke off ({str(error) or type(error).__name__})", 0.0
                if mistakes > self.retries:
                    return 502, _error(f"{self._where} broke off the answer ({str(error) or type(error).__name__}).")
            else:
                status, body = response.status_code, _object(response)
                if status in (401, 403):
                    raise UserError(f"{self._where} refuses: {_sentence(response)}. Give --api-key, or another one.")
                if status not in _LATER:
                    mistakes += status == 500 or (status == 200 and body is None)
                    if body is not None and (status != 500 or mistakes > self.retries):
                        return status, body
                    if body is None and (status != 200 or mistakes > self.retries):
                        what = "sends what is no JSON object" if status == 200 else f"answers {_sentence(response)}"
                        return (502 if status == 200 else status), _error(f"{self._where} {what}.")
                problem, wait = _sentence(response), _retry_after(response)
            wait = wait or min(0.5 * 2 ** min(attempt, 10), 30.0)
            if waited + wait > self.patience or "engine_dead" in problem:
                raise TinyserveError(
                    f"{self._where} answers no more: {problem}. What is answered is kept: run the same command again."
                )
            waited += wait
            await asyncio.sleep(wait)
        raise AssertionError

    @property
    def _where(self) -> str:
        url = self.client.base_url
        return str(url).rstrip("/") if self.retries else self.name  # it is a server, or it is here


def _object(response: "Response") -> dict[str, Any] | None:
    """The JSON object that a response is; None for all else."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) and not is_deeper(body, MAX_DEPTH) else None


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message}}


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
            fingerprint = f"{await asyncio.to_thread(llm.fingerprint)}-{_words_of(llm)}"
            chats = llm.chat_template is not None
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://", timeout=None) as client:
            yield Model(client, options.name, chats, fingerprint, concurrency, OWN_PATIENCE, 0)
    finally:
        await pool.close()


def _words_of(llm: "LLM") -> str:
    """A hash of what a model's files say beside weights: template, tokenizer, defaults."""
    if llm.tokenizer is None:
        return "0"
    template = llm.chat_template.source if llm.chat_template is not None else None
    ids = llm.tokenizer.encode("The 12 quick (brown) foxes\n\tjump - déjà vu, 日本語!")
    said = json.dumps([template, ids, llm.generation_config.defaults()], default=str)
    return hashlib.blake2b(said.encode(errors="surrogatepass"), digest_size=4).hexdigest()


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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{response.status_code} {response.reason_phrase}".strip()


@dataclass(frozen=True)
class Work:
    """What a worker is told, wherever it is: the job, what its rows are, and by which model they are answered."""

    job: Job
    manifest: Manifest
    first: Row
    rows: RowOptions
    model: ModelOptions
    any_bits: bool
    restart: bool

    def forget(self) -> None:
        """Remove what was answered before, where that is wanted."""
        if self.restart:
            clear(self.job.folder)
            with writing(self.job.folder):
                for name in (JOURNALS, TEMPORARY):
                    (self.job.folder / name).mkdir()

    @asynccontextmanager
    async def opened(self, on_row: "OnRow", progress: Progress, run: str = "") -> "AsyncIterator[Worker]":
        """A worker with its model, of a `run` that has others. Raises UserError for other bits than those before."""
        async with opened_model(self.model, progress) as model:
            self.forget()  # not before there is a model
            self.job.begin(self.manifest)
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
        # The rows that were asked first, and why those of them failed that did: None once one is answered.
        self._first = set[int]()
        self._first_failures: dict[int, str] | None = {} if most_failures else None

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
        counts = await asyncio.to_thread(self._job.done, shard)
        if counts is not None:
            self._hear(counts, True)
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
                        for row in self._job.input.rows(shard, self._rows.columns):
                            if row.number not in known:
                                await self._slots.acquire()
                                if len(self._first) < (self._most_failures or 0):
                                    self._first.add(row.number)
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
        self._stop_if_all_fail(row, outcome)
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
        if is_old and counts.failed < counts.rows:
            self._first_failures = None
        self._on_row(counts, is_old)

    def _stop_if_all_fail(self, row: Row, outcome: Outcome) -> None:
        if self._first_failures is None or row.number not in self._first:
            return
        if not outcome.is_failure:
            self._first_failures = None
            return
        self._first_failures[row.number] = _reason(outcome.fields)
        if len(self._first_failures) == self._most_failures:
            self._job.forget_journals_of_this_worker()
            raise UserError(
                f"The first {self._most_failures} rows all failed, and none is kept. The first one: "
                f"{self._first_failures[min(self._first_failures)]}"
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
