"""`tinyserve serve`: models behind OpenAI's HTTP interface, and a page to talk to them."""

import logging
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from tinyserve.cli import _names
from tinyserve.cli._options import check_range, engine_options, fields_of, with_options
from tinyserve.engine_options import EngineOptions
from tinyserve.errors import UserError
from tinyserve.fleet.options import FleetOptions, parse_replicas
from tinyserve.server.options import API_KEY_VARIABLE, ServeOptions


@dataclass(frozen=True, kw_only=True)
class FleetCommand:
    """What `serve` can be told of several engines of one model."""

    replicas: Annotated[
        str | None,
        typer.Option(
            metavar="N|MIN:MAX", help="So many engines of one model, on Ray; between two numbers as requests ask for."
        ),
    ] = None
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="The Ray cluster that they are on, or auto.  [default: RAY_ADDRESS, else one of our own on this "
            "machine]",
        ),
    ] = None
    join: Annotated[
        bool, typer.Option("--join", help="Start no replicas: be one more address of those that run there.")
    ] = False
    leave: Annotated[bool, typer.Option("--leave", help="At the end, leave the replicas running there.")] = False
    replica_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Silence after which a replica is given up.")
    ] = FleetOptions.replica_timeout
    retries: Annotated[
        int, typer.Option(metavar="NUMBER", help="How often a request is asked again whose replica was lost.")
    ] = FleetOptions.retries
    no_ray_auth: Annotated[bool, typer.Option("--no-ray-auth", help="Join a Ray cluster that asks for no token.")] = (
        False
    )

    def options(self) -> FleetOptions | None:
        """Those of a fleet; None for a server of its own. Raises UserError."""
        check(replica_timeout=self.replica_timeout, retries=self.retries)
        if self.replicas is None and self.address is None and not self.join:
            for option, said in (("--leave", self.leave), ("--no-ray-auth", self.no_ray_auth)):
                if said:
                    raise UserError(f"{option} goes with --replicas.")
            return None
        return FleetOptions(**vars(self) | {"replicas": parse_replicas(self.replicas or "1")})


@with_options(engine=engine_options(), fleet=fields_of(FleetCommand))
def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Presets, repo ids, folders or .gguf files; NAME=MODEL gives one another name. The first is loaded at "
            "once, and answers who names none.",
            autocompletion=_names.models,
        ),
    ],
    *,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="The address to listen at.")] = ServeOptions.host,
    port: Annotated[
        int, typer.Option(metavar="NUMBER", help="The port; 0 takes any that is free.")
    ] = ServeOptions.port,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help=f"Keys, one a line, of which clients need one. {API_KEY_VARIABLE} has one, too."
        ),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let everybody in who reaches an address beyond this machine.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Pages of this origin may call the server; several times, '*' for all."),
    ] = None,
    engine: EngineOptions,
    max_queue: Annotated[
        int,
        typer.Option(metavar="NUMBER", help="Answers that may wait for each model; beyond, 429 tells to come again."),
    ] = ServeOptions.max_queue,
    memory: Annotated[
        float | None,
        typer.Option(metavar="GB", help="For all models; idle ones make room.  [default: 80 % of what is free]"),
    ] = None,
    ngram: Annotated[
        bool,
        typer.Option(
            "--ngram", help="Speculative decoding: draft what repeats the prompt, and check several tokens a step."
        ),
    ] = False,
    tool_format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="How tools are called: llama-3, hermes, json...  [default: as chat templates show]"
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse fields that are not built, in place of naming them in a header.")
    ] = False,
    drain_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long SIGTERM waits for what runs.")
    ] = ServeOptions.drain_timeout,
    max_body: Annotated[float, typer.Option(metavar="MB", help="The largest request.")] = ServeOptions.max_body / 1e6,
    fleet: FleetCommand,
    batch_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Answer OpenAI's batches, too (/v1/batches), and keep them here."),
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="A line on stderr for each request: who, what, status, time, tokens.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings on stderr.")] = False,
) -> None:
    """Serve models over HTTP, as OpenAI does.

    At / is a page to talk to them. It listens at this machine's own address, and asks for no key there. The first
    SIGTERM or Ctrl-C lets what runs be finished, a second one stops at once.

    \b
    Examples:
      tinyserve serve smollm2-135m
      tinyserve serve tiny=./my-model.gguf granite-350m --port 8080
      TINYSERVE_API_KEY=secret tinyserve serve llama-3.2-1b --host 0.0.0.0
      tinyserve serve llama-3.2-1b --replicas 2
    """
    check(port=port, max_queue=max_queue, memory=memory, max_body=max_body, drain_timeout=drain_timeout)
    fleet_options = fleet.options()
    try:
        from tinyserve.server.run import serve as run
    except ImportError as error:
        raise UserError(f"serve needs the extra of that name ({error}): pip install 'tinyserve[serve]'.") from None
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("tinyserve").setLevel(logging.WARNING if quiet else logging.INFO)
    if access_log:
        logging.getLogger("tinyserve.server.access").setLevel(logging.INFO)  # beside --quiet, too
    if engine.chat_template is not None:
        from tinyserve.text.chat_template import read_template

        read_template(engine.chat_template)  # what is wrong with it is said before anything listens
    if ngram:
        engine = replace(engine, speculative_config={"method": "ngram"})
    options = ServeOptions(
        models=names(models),
        engine=engine,
        host=host,
        port=port,
        api_keys=keys(api_key_file),
        no_auth=no_auth,
        cors_origins=cors_origin or (),
        memory=_bytes(memory),
        tool_format=tool_format,
        strict=strict,
        access_log=access_log,
        max_queue=max_queue,
        max_body=round(max_body * 1e6),
        drain_timeout=drain_timeout,
        on_listen=lambda url: print(f"{url}  {', '.join(options.models)}; Ctrl-C stops.", file=sys.stderr, flush=True),
    )
    if fleet_options is not None:
        from tinyserve.fleet.run import serve as run_fleet

        if batch_dir is not None:
            raise UserError(
                "--batch-dir is for a server with one engine: have the fleet asked by `tinyserve batch --server`."
            )
        code = run_fleet(options, fleet_options)
    elif batch_dir is not None:
        from tinyserve.batch.service import BatchService

        rows = max(1, engine.max_num_seqs * 3 // 4)  # people find a place free
        service = BatchService(batch_dir, rows, options.api_keys[0] if options.api_keys else None)
        with service.held():
            code = run(options, service)
    else:
        code = run(options)
    if code:
        raise typer.Exit(code)


def names(models: list[str]) -> dict[str, str]:
    """The models by the names that clients give them; raises UserError for a name that stands twice."""
    named: dict[str, str] = {}
    for word in models:
        name, equals, source = word.partition("=")
        if not equals or Path(word).exists():
            name = source = word
        if not name or not source:
            raise UserError(f"MODEL is {word!r}; it must be a model, or NAME=MODEL.")
        if name in named:
            raise UserError(f"The model {name!r} is given twice: NAME=MODEL gives one of them another name.")
        named[name] = source
    return named


def keys(file: Path | None) -> list[str]:
    """The API keys of the environment and of a file; raises UserError for a file without any, or keys that are odd."""
    found = [os.environ[API_KEY_VARIABLE]] if API_KEY_VARIABLE in os.environ else []
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--api-key-file {file} cannot be read: {getattr(error, 'strerror', None) or error}."
            ) from None
        found += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise UserError(f"--api-key-file {file} has no key: write one a line.")
    for key in found:
        if not key.isascii() or not key.isprintable() or " " in key or not key:
            raise UserError(
                "An API key is empty, or has characters that a header cannot carry: take letters and digits."
            )
    return found


_RANGES = {
    "port": (0, 65535),
    "max_queue": (0, 1e6),
    "memory": (1e-3, 1e6),
    "max_body": (1e-3, 1e3),
    "drain_timeout": (0, 86400),
    "replica_timeout": (1, 86400),
    "retries": (0, 100),
}


def check(**options: float | None) -> None:
    """Raise UserError for a number that is out of range."""
    for name, value in options.items():
        if value is not None:
            check_range(f"--{name.replace('_', '-')}", value, *_RANGES[name])


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else round(gigabytes * 1e9)
