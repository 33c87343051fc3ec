"""`tinyserve batch`: files of requests, answered row by row, and gone on with wherever they were left.

Reads the command line and shows how far it is; the work is that of tinyserve.batch.
"""

import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from tinyserve.cli import _names
from tinyserve.cli._options import (
    ApiKey,
    JsonSchema,
    ReasoningEffort,
    Regex,
    check_range,
    engine_options,
    fields_of,
    sampling_options,
    with_options,
)
from tinyserve.cli._sampling import given, structure
from tinyserve.cli.serve import names
from tinyserve.engine_options import EngineOptions
from tinyserve.errors import UserError
from tinyserve.progress import LoadProgress, ProgressBar, say
from tinyserve.server.options import API_KEY_VARIABLE

if TYPE_CHECKING:
    from tinyserve.batch import BatchProgress, BatchReport
    from tinyserve.batch.run import BatchOptions
    from tinyserve.batch.work import WorkerOptions

_JSON_SECONDS, _LINE_SECONDS = 1.0, 60.0  # between two lines, for programs and in a log


@dataclass(frozen=True, kw_only=True)
class BatchCommand:
    """What `batch` can be told beside files, the engine and the sampling."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="A preset, a repo id, a folder or a .gguf file; NAME=MODEL where rows' bodies name it otherwise. With "
            "--server, one of its models, by default the first.",
            autocompletion=_names.models,
        ),
    ] = None
    server: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Have a running server answer, and load nothing here; its 429s are obeyed."),
    ] = None
    api_key: ApiKey = None
    prompt_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column with a prompt.  [default: prompt]")
    ] = None
    messages_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The column with a conversation.  [default: messages]")
    ] = None
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="A system message before each row's.")] = None
    raw: Annotated[bool, typer.Option("--raw", help="Continue prompts: no chat template.")] = False
    json_schema: JsonSchema = None
    regex: Regex = None
    reasoning_effort: ReasoningEffort = None
    tool_format: Annotated[
        str | None, typer.Option(metavar="NAME", help="How tools are called.  [default: as chat templates show]")
    ] = None
    max_concurrency: Annotated[
        int | None,
        typer.Option(metavar="NUMBER", help="Rows asked at once.  [default: twice --max-num-seqs; 32 of a server]"),
    ] = None
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|MIN:MAX", help="Models that answer, on a Ray cluster, up to MAX as there is room.  [default: 1]"
        ),
    ] = None
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="The Ray cluster, or auto.  [default: RAY_ADDRESS, else one on this machine]"
        ),
    ] = None
    no_ray_auth: Annotated[
        bool,
        typer.Option("--no-ray-auth", help="Join a cluster that asks for no token: something else keeps the door."),
    ] = False
    restart: Annotated[bool, typer.Option("--restart", help="Forget what was answered before, and write OUT anew.")] = (
        False
    )
    any_bits: Annotated[
        bool,
        typer.Option("--any-bits", help="Go on where the answers' last bits may differ from those of earlier runs."),
    ] = False
    json_: Annotated[bool, typer.Option("--json", help="Tell how far it is, and what came of it, as JSON lines.")] = (
        False
    )
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, and no summary.")] = False


@with_options(
    options=fields_of(BatchCommand),
    sampling=sampling_options(
        "At most this many new tokens for each row.  [default: as the server has it]", greedy=False
    ),
    engine=engine_options(),
)
def batch(
    inputs: Annotated[
        list[str], typer.Argument(metavar="IN...", help="Files, folders and patterns of .jsonl or .parquet.")
    ],
    output: Annotated[str, typer.Argument(metavar="OUT", help="What is written: a file, or a folder of parts.")],
    *,
    options: BatchCommand,
    sampling: dict[str, Any],
    engine: EngineOptions,
) -> None:
    """Answer files of requests, row by row.

    Rows are OpenAI's batch lines (custom_id, url, body), or have a column "prompt" or "messages"; then the row is
    written again with its answer. Row i of the output is row i of the input. A row that fails is a row with an error.

    Ended at any moment, by Ctrl-C, a crash or a power cut, the same command goes on: no row is answered twice in the
    output, and none is lost. What no option says is as a server's answers are: by the model's own settings.

    \b
    Examples:
      tinyserve batch questions.jsonl answers.jsonl --model smollm2-135m
      tinyserve batch 'in/*.parquet' answers/ --model llama-3.2-1b --messages-column chat --max-tokens 200
      tinyserve batch requests.jsonl out.jsonl --server http://127.0.0.1:8000
    """
    said = {name: value for name, value in sampling.items() if value is not None}
    said["structured_outputs"] = structure(options.json_schema, options.regex)
    given(**said)
    batch_options = _options(inputs, output, options, said, engine)
    from tinyserve.batch.run import run
    from tinyserve.server import heaps

    heaps.keep_heaps_small()
    logging.getLogger("tinyserve.server").addHandler(logging.NullHandler())  # what it says, errors and rows say
    stderr = _own_stderr() if batch_options.workers is not None else nullcontext()
    with stderr, _Shown(options, batch_options.model.name or options.server or "the model") as shown:
        report = run(batch_options, shown, shown.loading)
    shown.report(report)
    if report.failed:
        raise typer.Exit(1)


def _options(
    inputs: list[str], output: str, said: BatchCommand, sampling: dict[str, Any], engine: EngineOptions
) -> "BatchOptions":
    """The batch that a command line describes; raises UserError for what contradicts itself."""
    try:
        from tinyserve.batch.rows import RowOptions
        from tinyserve.batch.run import BatchOptions
        from tinyserve.batch.work import ModelOptions
        from tinyserve.server.client import request_fields
    except ImportError as error:
        raise UserError(f"batch needs the extra serve ({error}): pip install 'tinyserve[serve]'.") from None
    if said.max_concurrency is not None:
        check_range("--max-concurrency", said.max_concurrency, 1, 1 << 16)
    if said.server is None:
        if said.model is None:
            raise UserError("No model is named: --model MODEL, or --server URL for one that runs already.")
        if said.api_key is not None:
            raise UserError("--api-key is for a server, and none is given: add --server URL.")
        if engine.chat_template is not None:
            from tinyserve.text.chat_template import read_template

            read_template(engine.chat_template)  # what is wrong with it is said before anything is read
        ((name, source),) = names([said.model]).items()
        model = ModelOptions(name=name, source=source, engine=engine, tool_format=said.tool_format)
    else:
        for field in fields(EngineOptions):
            if (flag := field.metadata["flag"]) is not None and getattr(engine, field.name) != field.default:
                raise UserError(f"{flag.name} is the server's to decide: leave it out, or leave out --server.")
        if said.tool_format is not None:
            raise UserError("--tool-format is the server's to decide: leave it out, or leave out --server.")
        key = said.api_key or os.environ.get(API_KEY_VARIABLE)
        model = ModelOptions(name=said.model, server=said.server, api_key=key)
    seed = sampling.pop("seed", 0)
    body = request_fields(sampling)
    if said.reasoning_effort is not None:
        body["reasoning_effort"] = said.reasoning_effort
    return BatchOptions(
        inputs=inputs,
        output=output,
        model=replace(model, max_concurrency=said.max_concurrency),
        rows=RowOptions(
            body=body,
            prompt_column=said.prompt_column,
            messages_column=said.messages_column,
            system=said.system,
            raw=said.raw,
            seed=seed,
        ),
        workers=_workers(said),
        restart=said.restart,
        any_bits=said.any_bits,
    )


class _WithoutRaylet(io.TextIOWrapper):
    """Leaves out what Ray's daemon has to say, such as of workers that are ended, which is printed in two pieces."""

    _left_out = False

    def write(self, text: str) -> int:
        end, self._left_out = self._left_out and text == "\n", "(raylet)" in text
        return len(text) if end or self._left_out else super().write(text)


@contextmanager
def _own_stderr() -> Iterator[None]:
    """Keep Ray from writing where the progress is: it warns of what it does itself, and has log files."""
    if sys.stderr is None:
        yield
        return
    sys.stderr.flush()
    stderr, ours = sys.stderr, os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    sys.stderr = _WithoutRaylet(os.fdopen(os.dup(ours), "wb", 0), errors="replace", write_through=True)
    try:
        yield
    finally:
        sys.stderr.close()
        sys.stderr = stderr
        os.dup2(ours, 2)
        os.close(ours)


def _workers(said: BatchCommand) -> "WorkerOptions | None":
    """The workers on a cluster that are asked for; None for one in this process."""
    from tinyserve.batch.run import MOST_WORKERS, worker_options

    if said.workers is None and said.address is None:
        if said.no_ray_auth:
            raise UserError("--no-ray-auth is for a Ray cluster, and none is asked for: add --address.")
        return None
    if said.server is not None:
        raise UserError(
            "--workers and --address are for models here, and --server answers: leave out one or the other."
        )
    match = re.fullmatch(r"(\d+)(?::(\d+))?", said.workers or "1")
    workers = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= workers[0] <= workers[1] <= MOST_WORKERS:
        raise UserError(
            f"--workers is {said.workers!r}; it must be a number from 1 to {MOST_WORKERS}, or two of them as 2:16."
        )
    return worker_options(workers, said.address, no_ray_auth=said.no_ray_auth)


class _Shown:
    """What is seen of a batch while it runs: a bar, JSON lines, or a line a minute in a log."""

    def __init__(self, said: BatchCommand, name: str):
        self._json, self._quiet = said.json_, said.quiet
        self._loading = LoadProgress(name, prompts=False)
        self._stack = ExitStack()
        self._bar = ProgressBar()
        self._told = monotonic()

    def __enter__(self) -> Self:
        self._stack.enter_context(self._bar)
        self._stack.enter_context(self._loading)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def loading(self, stage: str, done: int, total: int) -> None:
        """Hear of reading the input, and of loading the model."""
        if not self._quiet:
            self._loading(stage, done, total)

    def __call__(self, progress: "BatchProgress") -> None:
        """Hear how far it is."""
        self._loading.clear()
        new = progress.rows - progress.resumed
        rate = progress.output_tokens / progress.seconds if progress.seconds else 0.0
        left = progress.seconds / new * (progress.total - progress.rows) if new else None
        now = monotonic()
        if self._json:
            if now - self._told >= _JSON_SECONDS:
                self._told = now
                _print({**vars(progress), "tokens_per_second": rate, "seconds_left": left})
            return
        if self._quiet:
            return
        failed = f", {progress.failed} failed" if progress.failed else ""
        until = f", {timedelta(seconds=round(left))} left" if left is not None else ""
        words = f"{progress.rows}/{progress.total}{failed}, {rate:.0f} tokens/s{until}"
        if self._bar.is_shown:
            self._bar("rows", progress.rows, progress.total, words)
        elif now - self._told >= _LINE_SECONDS:
            self._told = now
            say(f"tinyserve: {words}")

    def report(self, report: "BatchReport") -> None:
        """What came of it."""
        if self._json:
            _print({**asdict(report), "output": str(report.output)})
        elif not self._quiet:
            resumed = f", {report.resumed} of them before" if report.resumed else ""
            failed = f"; {report.failed} failed, and say why" if report.failed else ""
            say(
                f"tinyserve: {report.output}: {report.rows} row{'s' * (report.rows != 1)} answered{resumed}, "
                f"{report.output_tokens} tokens, {timedelta(seconds=round(report.seconds))}{failed}."
            )


def _print(said: dict[str, Any]) -> None:
    print(json.dumps(said), flush=True)
