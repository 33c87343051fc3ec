"""OpenAI's files and batches over HTTP: /v1/files and /v1/batches, answered by this server one after the other.

Their rows are requests of a low priority to the server's own application, beside those of people. All there is lies in
a folder: a server that is started again goes on.
"""

import asyncio
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from tinyserve.batch.counts import Counts
from tinyserve.batch.disk import encoded, new_file, writing
from tinyserve.batch.job import TEMPORARY, Job, opened, remove
from tinyserve.batch.manifest import Manifest
from tinyserve.batch.rows import OpenAIRows
from tinyserve.batch.shards import Input, read_input
from tinyserve.batch.work import Model, Worker
from tinyserve.errors import TinyserveError, UserError
from tinyserve.server.errors import ApiError
from tinyserve.server.protocol import Body
from tinyserve.server.state import Json, read

logger = logging.getLogger("tinyserve.batch")

MAX_FILE = 512_000_000  # bytes, as OpenAI's
LOW_PRIORITY = 1000  # requests of people have 0 unless they say so, and come first
SAVE_SECONDS = 1.0  # between two counts on the disk
PATIENCE = float("inf")  # seconds: a server that is full has room some time
AGAIN_SECONDS = 30.0  # behind what is no fault of the batch
_ENDED = ("failed", "completed", "cancelled", "expired")


class BatchBody(Body):
    """POST /v1/batches."""

    ignored = {"output_expires_after": (), "model": ()}  # noqa: RUF012

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: str = "24h"
    metadata: dict[str, str] | None = None


@dataclass(frozen=True)
class Folder:
    """What is kept: files with a description each, and batches."""

    path: Path

    def make(self) -> None:
        with writing(self.path):
            for name in ("files", "batches", TEMPORARY):
                (self.path / name).mkdir(parents=True, exist_ok=True)

    def content(self, file: str) -> Path:
        return self.path / "files" / f"{file}.jsonl"

    def work(self, batch: str) -> Path:
        """The folder of a batch's job."""
        return self.path / "batches" / batch

    def save(self, kind: str, what: Mapping[str, Any]) -> None:
        """Write the description of a file or a batch in place of the one before."""
        with writing(self.path), new_file(self._description(kind, what["id"]), self.path / TEMPORARY) as path:
            path.write_text(json.dumps(what), encoding="utf-8")

    def load(self, kind: str, name: str) -> dict[str, Any]:
        """Raises ApiError 404."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            if re.fullmatch(r"(file|batch)-?_?[0-9a-f]{32}", name):
                found: dict[str, Any] = json.loads(self._description(kind, name).read_bytes())
                if found["id"] == name:
                    return found
        what = {"files": "file", "batches": "batch"}[kind]
        raise ApiError(404, f"There is no {what} {name!r:.80}.", param="id", code="not_found")

    def all(self, kind: str) -> list[dict[str, Any]]:
        """The newest first."""
        found = list[dict[str, Any]]()
        for path in (self.path / kind).glob("*.json"):
            with suppress(ApiError):
                found.append(self.load(kind, path.stem))
        return sorted(found, key=lambda one: (one["created_at"], one["id"]), reverse=True)

    def delete(self, kind: str, name: str) -> None:
        self._description(kind, name).unlink(missing_ok=True)
        self.content(name).unlink(missing_ok=True)

    def _description(self, kind: str, name: str) -> Path:
        return self.path / kind / f"{name}.json"

    def add(self, pieces: Iterable[bytes], filename: str, purpose: str) -> dict[str, Any]:
        """Write a file; it is there when this returns. One of a batch takes the place of what it was before."""
        of_batch = purpose == "batch_output"
        name = f"file-{uuid.uuid5(uuid.NAMESPACE_URL, filename).hex if of_batch else _new_name()}"
        content = self.content(name)
        with writing(self.path), new_file(content, self.path / TEMPORARY) as path, path.open("wb") as file:
            file.writelines(pieces)
        described = {
            "id": name, "object": "file", "bytes": content.stat().st_size, "created_at": int(time.time()),
            "filename": filename, "purpose": purpose, "status": "processed",
        }  # fmt: skip
        self.save("files", described)
        return described


class BatchService:
    """The endpoints, and the task that answers batches while the server runs; `concurrency` rows at a time."""

    def __init__(self, folder: Path, concurrency: int, api_key: str | None = None):
        self.folder = Folder(folder)
        self.max_bodies = {"/v1/files": MAX_FILE}
        self._concurrency, self._api_key = concurrency, api_key
        self._changed = asyncio.Event()
        self._ending = threading.Lock()
        self._running: tuple[str, asyncio.Task[None]] | None = None

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/v1/files", self._upload, methods=["POST"]),
            Route("/v1/files", self._files),
            Route("/v1/files/{id}", self._file),
            Route("/v1/files/{id}", self._delete, methods=["DELETE"]),
            Route("/v1/files/{id}/content", self._content),
            Route("/v1/batches", self._create, methods=["POST"]),
            Route("/v1/batches", self._batches),
            Route("/v1/batches/{id}", self._batch),
            Route("/v1/batches/{id}/cancel", self._cancel, methods=["POST"]),
        ]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have the folder for oneself. Raises UserError where another server has it, TinyserveError where it cannot be
        written.
        """
        from filelock import FileLock, Timeout

        self.folder.make()
        lock = FileLock(self.folder.path / "_lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"--batch-dir {self.folder.path} is another server's: give each its own.") from None
        try:
            yield
        finally:
            lock.release()

    @asynccontextmanager
    async def running(self, app: Starlette) -> AsyncIterator[None]:
        """Answer batches until the block ends; what is left goes on at the next start."""
        self.folder.make()
        work = asyncio.create_task(self._work(app))
        try:
            yield
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    # --- files --------------------------------------------------------------------------------------------------------

    async def _upload(self, request: Request) -> Response:
        try:
            async with request.form(max_files=1, max_fields=16) as form:
                given, purpose = form.get("file"), form.get("purpose")
                if not isinstance(given, UploadFile):
                    raise ApiError(400, "The form has no file: send one, as multipart/form-data.", param="file")
                if purpose != "batch":
                    raise ApiError(400, f"purpose is {purpose!r:.80}; it must be 'batch'.", param="purpose")
                return Json(await asyncio.to_thread(self._keep, given))
        except HTTPException as error:  # Starlette's, of a body that it cannot read
            raise ApiError(400, f"The body is no form: {error.detail}", code="invalid_form") from None

    def _keep(self, given: UploadFile) -> dict[str, Any]:
        pieces = iter(partial(given.file.read, 1 << 20), b"")
        return self.folder.add(pieces, (given.filename or "batch.jsonl")[:200], "batch")

    async def _files(self, request: Request) -> Response:
        purpose = request.query_params.get("purpose")
        files = [one for one in self.folder.all("files") if purpose in (None, one["purpose"])]
        return _page(request, files, most=10_000)

    async def _file(self, request: Request) -> Response:
        return Json(self.folder.load("files", request.path_params["id"]))

    async def _content(self, request: Request) -> Response:
        file = self.folder.load("files", request.path_params["id"])
        if not self.folder.content(file["id"]).is_file():
            raise ApiError(404, f"The content of {file['id']} is gone.", param="id", code="not_found")
        return FileResponse(
            self.folder.content(file["id"]), media_type="application/octet-stream", filename=file["filename"]
        )

    async def _delete(self, request: Request) -> Response:
        file = self.folder.load("files", request.path_params["id"])
        for batch in self.folder.all("batches"):
            if batch["input_file_id"] == file["id"] and batch["status"] not in _ENDED:
                raise ApiError(409, f"The file is the input of {batch['id']}, which has not ended: cancel it first.")
        self.folder.delete("files", file["id"])
        return Json({"id": file["id"], "object": "file", "deleted": True})

    # --- batches ------------------------------------------------------------------------------------------------------

    async def _create(self, request: Request) -> Response:
        body = await read(request, BatchBody)
        if body.completion_window != "24h":
            raise ApiError(
                400,
                f"completion_window is {body.completion_window!r:.80}; it must be '24h'.",
                param="completion_window",
            )
        file = self.folder.load("files", body.input_file_id)
        batch = {
            "id": f"batch_{_new_name()}", "object": "batch", "endpoint": body.endpoint, "errors": None,
            "input_file_id": file["id"], "completion_window": body.completion_window, "status": "validating",
            "output_file_id": None, "error_file_id": None, "created_at": int(time.time()), "in_progress_at": None,
            "expires_at": None, "finalizing_at": None, "completed_at": None, "failed_at": None, "expired_at": None,
            "cancelling_at": None, "cancelled_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0}, "metadata": body.metadata,
        }  # fmt: skip
        self.folder.save("batches", batch)
        self._changed.set()
        return Json(batch)

    async def _batches(self, request: Request) -> Response:
        return _page(request, self.folder.all("batches"), most=100)

    async def _batch(self, request: Request) -> Response:
        return Json(self.folder.load("batches", request.path_params["id"]))

    async def _cancel(self, request: Request) -> Response:
        batch = self.folder.load("batches", request.path_params["id"])
        if batch["status"] in (*_ENDED, "finalizing"):
            raise ApiError(409, f"{batch['id']} is {batch['status']}: there is nothing to cancel.", param="id")
        batch |= {"status": "cancelling", "cancelling_at": int(time.time())}
        self.folder.save("batches", batch)
        if self._running is not None and self._running[0] == batch["id"]:
            self._running[1].cancel()
        self._changed.set()
        return Json(batch)

    # --- the work -----------------------------------------------------------------------------------------------------

    async def _work(self, app: Starlette) -> None:
        """Answer one batch after the other, the oldest first."""
        while True:
            try:
                await self._work_once(app)
            except Exception as error:  # of a disk, say: what it was at is still to be done
                logger.error("batches wait: %s", error)
                await asyncio.sleep(AGAIN_SECONDS)

    async def _work_once(self, app: Starlette) -> None:
        self._changed.clear()
        waiting = [one for one in self.folder.all("batches") if one["status"] not in _ENDED]
        if not waiting:
            await self._changed.wait()
            return
        batch = waiting[-1]
        cancelling = next((one for one in waiting if one["status"] == "cancelling"), None)
        if cancelling is not None:
            await asyncio.to_thread(self._end, cancelling["id"], "cancelled")
            return
        task = asyncio.create_task(self._answer(app, batch))
        self._running = batch["id"], task
        try:
            await asyncio.wait({task})
        finally:
            self._running = None
            task.cancel()  # the server ends
        error = None if task.cancelled() else task.exception()
        if isinstance(error, TinyserveError) and not isinstance(error, UserError):  # a full disk, a dead engine
            logger.error("%s waits: %s", batch["id"], error)
            await asyncio.sleep(AGAIN_SECONDS)
        elif error is not None:
            logger.error("%s failed: %s", batch["id"], error)
            await asyncio.to_thread(self._fail, batch["id"], str(error) or type(error).__name__)

    async def _answer(self, app: Starlette, batch: dict[str, Any]) -> None:
        job = await asyncio.to_thread(self._job, batch)
        counts = Counts()
        batch |= {"status": "in_progress", "in_progress_at": batch["in_progress_at"] or int(time.time())}
        batch["request_counts"]["total"] = job.input.num_rows
        self.folder.save("batches", batch)
        saved = time.monotonic()

        def hear(more: Counts, is_old: bool) -> None:
            nonlocal saved
            counts.add(more)
            batch["request_counts"] |= {"completed": counts.rows - counts.failed, "failed": counts.failed}
            if time.monotonic() - saved > SAVE_SECONDS:
                saved = time.monotonic()
                if self.folder.load("batches", batch["id"])["status"] == "in_progress":
                    self.folder.save("batches", batch)

        manifest = Manifest([vars(file) for file in job.input.files], {"endpoint": batch["endpoint"]})
        with opened(job.output, manifest, restart=False):
            job.begin(manifest)
            rows = OpenAIRows(0, batch["endpoint"], LOW_PRIORITY)
            async with self._model(app) as model:
                await Worker(job, rows, model, hear, most_failures=None).run(job.input.shards)
            batch |= {"status": "finalizing", "finalizing_at": int(time.time())}
            self.folder.save("batches", batch)
        await asyncio.to_thread(self._end, batch["id"], "completed")

    def _job(self, batch: Mapping[str, Any]) -> Job:
        """The job of a batch; raises UserError for a file that cannot be read, or has none."""
        given: Input = read_input([str(self.folder.content(batch["input_file_id"]))])
        output = self.folder.work(batch["id"])
        return Job(output, given, merges=False)

    @asynccontextmanager
    async def _model(self, app: Starlette) -> AsyncIterator[Model]:
        import httpx2

        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app), base_url="http://localhost", timeout=None, headers=headers
        ) as client:
            name = app.state.server.pool.default.name
            yield Model(client, name, True, None, self._concurrency, PATIENCE, 0)

    def _end(self, name: str, status: str) -> None:
        """Make files of what is answered, once: a thread that nobody waits for any more may still be at it."""
        with self._ending:
            batch = self.folder.load("batches", name)
            if batch["status"] not in _ENDED:
                self._make_files(batch)
                batch |= {"status": status, f"{status}_at": int(time.time())}
                self.folder.save("batches", batch)
                remove(self.folder.work(name))

    def _make_files(self, batch: dict[str, Any]) -> None:
        with suppress(UserError):  # nothing was ever begun
            job = self._job(batch)
            failures = [outcome.is_failure for outcome in job.outcomes()]
            batch["request_counts"] |= {"completed": failures.count(False), "failed": failures.count(True)}
            for field, name, wanted in (("output_file_id", "output", False), ("error_file_id", "errors", True)):
                if wanted in failures:
                    lines = (encoded(one.fields) for one in job.outcomes() if one.is_failure is wanted)
                    batch[field] = self.folder.add(lines, f"{batch['id']}_{name}.jsonl", "batch_output")["id"]

    def _fail(self, name: str, message: str) -> None:
        batch = self.folder.load("batches", name)
        message = message.replace(str(self.folder.content(batch["input_file_id"])), "The file")
        error = {"code": "invalid_input", "message": message, "line": None, "param": None}
        batch |= {"status": "failed", "failed_at": int(time.time()), "errors": {"object": "list", "data": [error]}}
        self.folder.save("batches", batch)


def _new_name() -> str:
    """32 hexadecimal digits; of two the later one is greater."""
    return f"{time.time_ns():016x}{uuid.uuid4().hex[:16]}"


def _page(request: Request, everything: Sequence[dict[str, Any]], most: int) -> Response:
    """OpenAI's list: `limit` of them behind `after`."""
    query = request.query_params
    given = query.get("limit", str(min(most, 20 if most == 100 else most)))
    if not given.isdecimal() or len(given) > 6 or not 1 <= int(given) <= most:
        raise ApiError(400, f"limit is {given!r:.80}; it must be a number from 1 to {most}.", param="limit")
    found = list(everything)
    if query.get("order") == "asc":
        found.reverse()
    names = [one["id"] for one in found]
    if (after := query.get("after")) is not None:
        found = found[names.index(after) + 1 :] if after in names else []
    page = found[: int(given)]
    return Json(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(found) > len(page),
        }
    )
