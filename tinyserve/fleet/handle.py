"""Replicas by a handle of Ray Serve: how they are asked, given up and counted, and the application they are of.

The only file of the fleet that calls Ray Serve, but for what a replica asks of its own context.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from tinyserve.errors import TinyserveError, UserError
from tinyserve.fleet.attempts import LostError
from tinyserve.fleet.messages import Call, Identity, Item, Report
from tinyserve.server.errors import ApiError
from tinyserve.server.pool import in_thread

logger = logging.getLogger("tinyserve.fleet")

DEPLOYMENT = "Replica"
NAMESPACE = "serve"  # of Serve's actors
POLL_SECONDS = 1.0
CONTROLLER_SECONDS = 15.0  # until Serve's controller has to have answered
REPORT_SECONDS = 3.0
ROUTER_POLLS = 5  # until a new way to the replicas has heard of them

# Read by Serve as it is imported, in the front and in the replicas: streams over gRPC in the event loop that is there
# cost a third of the processor time of those by Ray's objects, and one thread less.
ENVIRONMENT = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(1 << 30),  # bytes: --max-body is what bounds a request
}


@dataclass(frozen=True)
class Condition:
    """How an application is: how many replicas run, and why it has failed, if it has."""

    running: int = 0
    is_up: bool = False
    failure: str | None = None


class Application:
    """An application of Ray Serve with replicas of one model."""

    def __init__(self, name: str):
        self.name = name
        self._handle: Any = None
        self._ending: set[asyncio.Task[None]] = set()

    # --- the application

    async def deploy(self, replica: type, argument: Any, options: dict[str, Any]) -> None:
        """Have it run with these options of a deployment; on one that runs, a rolling update of what differs."""
        await in_thread(lambda: self._deploy(replica, argument, options))

    def _deploy(self, replica: type, argument: Any, options: dict[str, Any]) -> None:
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what it does in this process
        serve.start(proxy_location="Disabled")
        deployment = serve.deployment(replica, name=DEPLOYMENT, **options)
        target = serve.RunTarget(target=deployment.bind(argument), name=self.name, route_prefix=None)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    async def condition(self) -> Condition:
        """How it is now; raises TinyserveError where the cluster does not answer."""
        try:
            async with asyncio.timeout(CONTROLLER_SECONDS):
                return await in_thread(self._condition)
        except Exception as error:
            raise TinyserveError(f"The Ray cluster does not answer ({type(error).__name__}).") from error

    def _condition(self) -> Condition:
        from ray import serve

        application = serve.status().applications.get(self.name)
        if application is None:
            return Condition()
        deployment = application.deployments.get(DEPLOYMENT)
        running = deployment.replica_states.get("RUNNING", 0) if deployment is not None else 0
        failure = None
        if application.status == "DEPLOY_FAILED":
            failure = _reason(f"{application.message}\n{deployment.message if deployment is not None else ''}")
        return Condition(running, application.status == "RUNNING", failure)

    async def runs(self, version: str) -> bool:
        """Whether it runs already, and all of its replicas were told this."""
        if not (await self.condition()).running:
            return False
        await self.attach()
        told: list[Report] = []
        for _ in range(ROUTER_POLLS):
            if told := await self.reports():
                break
            await asyncio.sleep(POLL_SECONDS)
        return bool(told) and all(one.version == version for one in told)

    def is_there(self) -> bool:
        """Whether replicas of it run."""
        return self._condition().running > 0

    async def attach(self) -> None:
        """Make the way to its replicas in this event loop; raises UserError where there is no such application."""
        from ray.serve.exceptions import RayServeException

        def find() -> Any:
            from ray import serve

            return serve.get_app_handle(self.name)

        try:
            handle = await in_thread(find)
        except RayServeException:
            raise UserError(f"No fleet of the name {self.name!r} runs on the cluster: leave out --join.") from None
        self._handle = handle.options(stream=True, method_name="answer")

    async def delete(self) -> None:
        """Take it down."""

        def delete() -> None:
            from ray import serve

            serve.delete(self.name)

        await in_thread(delete)

    # --- its replicas

    async def call(self, call: Call, key: str | None) -> AsyncGenerator[Item, None]:
        """Ask one replica; raises LostError as soon as it is known to be gone."""
        import grpc
        from ray.exceptions import RayError, RayTaskError, TaskCancelledError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

        handle = self._handle if key is None else self._handle.options(session_id=key)
        response = handle.remote(call)
        is_whole = False
        try:
            async for item in response:
                yield item
            is_whole = True
        except (DeploymentUnavailableError, BackPressureError):
            raise ApiError(
                503, "No replica takes requests: ask again later.", code="no_replica", retry_after=5
            ) from None
        except (TaskCancelledError, RequestCancelledError, grpc.RpcError) as error:
            raise LostError(_kind(error)) from None
        except RayTaskError as error:
            logger.error("a replica failed: %s", error)
            raise ApiError(500, "The server made a mistake; its log says more.") from None
        except RayError as error:
            raise LostError(_kind(error)) from None
        finally:
            if not is_whole:
                response.cancel()

    def give_up(self, replica: Identity) -> None:
        """Have Ray end a replica's process; Serve starts another."""
        logger.warning("replica %s is silent, and is given up", replica.name)
        task = asyncio.get_running_loop().create_task(_quietly(lambda: _kill(replica.actor)))
        self._ending.add(task)  # or nobody holds it
        task.add_done_callback(self._ending.discard)

    async def reports(self) -> list[Report]:
        """What each replica is doing; of those that do not answer, nothing."""
        if self._handle is None:
            return []
        try:
            asked = self._handle.broadcast("report")
            told = await asked.results_async(timeout_s=REPORT_SECONDS, return_exceptions=True)
        except Exception as error:
            logger.debug("no reports: %s", error)
            return []
        return [one for one in told if isinstance(one, Report)]


async def _quietly(work: Callable[[], None]) -> None:
    try:
        await in_thread(work)
    except Exception as error:
        logger.debug("%s", error)


def _kill(actor: str) -> None:
    import ray

    ray.kill(ray.get_actor(actor, namespace=NAMESPACE), no_restart=True)


def _kind(error: BaseException) -> str:
    return type(error).__name__


def _reason(message: str) -> str:
    """The sentence of an error in what Serve says of a replica that could not start, which has a traceback in it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for line in reversed(lines):
        kind, colon, rest = line.partition(": ")
        if colon and kind.split(".")[-1].endswith("Error") and kind.startswith("tinyserve."):
            return rest
    return lines[-1] if lines else "no reason is known"
