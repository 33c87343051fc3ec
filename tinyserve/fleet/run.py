"""A fleet as a process: the cluster it is on, the front that listens, and what is left when a signal comes.

Knows what has to be there before what; the parts know how they work.
"""

import logging
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from starlette.applications import Starlette

from tinyserve.checkpoints.model_ref import ModelRef
from tinyserve.cluster import Session, connect
from tinyserve.engine_options import EngineOptions
from tinyserve.errors import UserError
from tinyserve.fleet.attempts import Attempts
from tinyserve.fleet.front import Front, Gate, create_front
from tinyserve.fleet.handle import ENVIRONMENT, Application
from tinyserve.fleet.options import FleetOptions, Plan, deployment_options, places, plan, threads_of, version_of
from tinyserve.fleet.replica import Replica, ReplicaOptions
from tinyserve.models.config import ModelConfig, parse_config
from tinyserve.models.lookup import load_raw_config
from tinyserve.progress import LoadProgress, Progress
from tinyserve.server import run
from tinyserve.server.guards import Admission
from tinyserve.server.options import ServeOptions
from tinyserve.tensor import _jit
from tinyserve.text.chat_template import read_template

logger = logging.getLogger("tinyserve.fleet")

GRACE = 30.0  # seconds behind the drain timeout, in which a cluster is taken down
BEAT = 5.0  # seconds between two signs of life of a replica that has nothing to say


def serve(options: ServeOptions, fleet: FleetOptions, replica: type[Replica] = Replica) -> int:
    """Serve until a signal comes; returns the exit code. Raises UserError for what cannot work."""
    run.check(options)
    if len(options.models) != 1:
        raise UserError(
            f"--replicas serves one model, and {len(options.models)} are given: start a server for each of them."
        )
    ((name, source),) = options.models.items()
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    is_own = not (fleet.address or os.environ.get("RAY_ADDRESS"))
    for option, said in (("--join", fleet.join), ("--leave", fleet.leave)):
        if said and is_own:
            raise UserError(f"{option} is for a cluster that runs already: say which by --address, or RAY_ADDRESS.")
    if options.memory is not None:
        raise UserError("--memory is of a single process: --kv-cache-memory bounds the cache of each replica.")
    most = fleet.replicas[1]
    with run.listen(options.host, options.port) as listener:
        with LoadProgress(name) as progress:
            model = _open(source, options, progress, whole=is_own)
        cores = _jit.usable_cores()
        threads = threads_of(options.engine, [cores], most)
        told_cores = max(cores, most * threads) if is_own else None
        with ExitStack() as stack:
            with LoadProgress(name) as progress:
                connection = connect(fleet.address, no_ray_auth=fleet.no_ray_auth, cores=told_cores, progress=progress)
                session = stack.enter_context(connection)
            if is_own and most * threads > cores:
                logger.warning(
                    "%d replicas with %s each share %s: they take turns, and are no faster than fewer.",
                    most, _many(threads, "thread"), _many(cores, "core"),
                )  # fmt: skip
            application = Application(_application_name(name))
            nodes = list(session.nodes)
            if session.is_own:
                nodes = [replace(node, cores=cores) for node in nodes]
            elif application.is_there():  # and holds the memory that its successors will have
                nodes = [replace(node, free_memory=max(node.free_memory, node.memory)) for node in nodes]
            each = plan(name, model.config, options.engine, model.packed, nodes, most)
            fleet_app = _FleetApp(options, fleet, session, application, each, replica)
            return run.run(options, listener, fleet_app.make, GRACE)


class _FleetApp:
    """The application of a front, and what it does with that of the replicas as it begins and ends."""

    def __init__(
        self,
        options: ServeOptions,
        fleet: FleetOptions,
        session: Session,
        application: Application,
        each: Plan,
        replica: type[Replica],
    ):
        self._options, self._fleet, self._session, self._application = options, fleet, session, application
        self._each, self._replica = each, replica
        self._deployed: str | None = None  # the version that we have started
        ((self._name, source),) = options.models.items()
        self._told = ReplicaOptions(
            name=self._name,
            source=_on_nodes(source),
            engine=_engine_on_nodes(each.engine),
            tool_format=options.tool_format,
            strict=options.strict,
            max_queue=options.max_queue,
            max_body=options.max_body,
            cores=each.cores,
            beat=min(BEAT, fleet.replica_timeout / 3),
        )

    def make(self, admission: Admission, fail: Callable[[Exception], None]) -> Starlette:
        """The ASGI application."""
        options, fleet = self._options, self._fleet
        front = Front(
            model=self._name,
            application=self._application,
            attempts=Attempts(self._application, fleet.retries, fleet.replica_timeout),
            gate=Gate(options.max_queue),
            places=places(self._each.engine),
            wanted=fleet.replicas[0],
        )
        return create_front(front, admission, self._deploy, self._take_down, fail, access_log=options.access_log)

    async def _deploy(self) -> None:
        """Have the replicas run, unless those that run were told the same."""
        # What the user has said, for how much memory is free is never the same.
        own = replace(self._told, engine=_engine_on_nodes(self._options.engine), cores=0)
        version = version_of(own, self._fleet.replicas, self._options.drain_timeout)
        if self._fleet.join or (not self._session.is_own and await self._application.runs(version)):
            return
        told = replace(self._told, version=version)
        environment = {} if self._session.is_own else ENVIRONMENT  # a cluster of our own has it from this process
        options = deployment_options(self._fleet, self._each, self._options.drain_timeout, environment)
        await self._application.deploy(self._replica, told, options)
        self._deployed = version

    async def _take_down(self) -> None:
        """End what we have started, unless others have changed it since; an own cluster ends with all that is on it."""
        if self._deployed is None or self._session.is_own or self._fleet.leave:
            return
        if await self._application.runs(self._deployed) or not (await self._application.condition()).running:
            await self._application.delete()


class _Model(NamedTuple):
    config: ModelConfig
    packed: str | None  # the dtype of weights that `tinyserve quantize` has packed


def _open(source: str, options: ServeOptions, progress: Progress, whole: bool) -> _Model:
    """What is known of a model beforehand; `whole` where its files are needed here, which are downloaded."""
    from tinyserve.loading import open_model

    if whole:
        files = open_model(source, options.engine.load_format, progress, options.engine.chat_template)
        return _Model(files.config, files.packed_dtype)
    raw, place = load_raw_config(ModelRef.parse(source))
    return _Model(parse_config(raw, place), (raw.get("quantization_config") or {}).get("dtype"))


def _on_nodes(source: str) -> str:
    """A name or a path that means the same in every process."""
    return str(Path(source).absolute()) if Path(source).exists() else source


def _engine_on_nodes(engine: EngineOptions) -> EngineOptions:
    """The options of an engine with what they say of files as it is for every process."""
    template, draft = engine.chat_template, engine.speculative_config
    if template is not None:
        template, _ = read_template(template)
    if draft is not None and "model" in draft:
        draft = {**draft, "model": _on_nodes(str(draft["model"]))}
    return replace(engine, chat_template=template, speculative_config=draft)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _application_name(model: str) -> str:
    return "tinyserve-" + (re.sub(r"[^A-Za-z0-9_.-]+", "-", model).strip("-") or "model")
