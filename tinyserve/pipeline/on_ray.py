"""Slices as actors of Ray: where they are put, what is sent to them, and what is done when one dies or falls silent.

Knows processes and machines; what is computed in them is slice.py's.
"""

import logging
import pickle
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from tinyserve.cluster import ENDING, connect
from tinyserve.errors import CacheLostError, EngineDeadError, TinyserveError, UserError
from tinyserve.models.cache_plan import CachePlan
from tinyserve.models.config.costs import weight_bytes
from tinyserve.pipeline.micro_batches import PER_SLICE
from tinyserve.pipeline.partition import Place
from tinyserve.pipeline.slice import Loaded, Message, Part, Slice
from tinyserve.progress import Progress, size
from tinyserve.tensor._jit import cores
from tinyserve.tensor.cgroups import available_memory

Array = np.ndarray

SILENCE = 30.0  # seconds without an answer, after which a slice is asked whether it lives
PING_SECONDS = 10.0  # that it has to say so; a kernel leaves the interpreter to the thread that does
START_SECONDS = 120.0  # until all processes have to have begun
RECOVERY_SECONDS = 600.0  # until one that has died has to have its layers again
_STORE = 1 << 29  # bytes of shared memory at most, which take room when they are used: what is under way of a step
_MESSAGE = 1 << 16  # bytes that each place in it begins with; Ray lets them grow


class SliceActor(Slice):
    """A slice in a process of its own, for messages that come from another."""

    def __init__(self, part: Part):
        from ray.experimental.channel.common import ChannelContext

        super().__init__(part)
        ChannelContext.get_current()._torch_available = False  # or Ray imports it: 190 MB, for tensors that never come

    def place(self) -> Place:
        """Its node, by Ray's name for it, and what is free there."""
        return _here()

    def run_packed(self, message: bytes, stream: bytes | None) -> bytes:
        """`run`, of bytes, which Ray passes on in half the time of an array; all slices get the same message."""
        return self.run(pickle.loads(message), self._unpacked(stream)).tobytes()

    def _unpacked(self, stream: bytes | None) -> Array | None:
        return None if stream is None else unpacked(stream, self.part.config.hidden_size)

    def ping(self) -> None:
        """Called in a thread of its own, which answers while `run` runs."""


def unpacked(stream: bytes, width: int) -> Array:
    """(tokens, `width`) float32."""
    return np.frombuffer(stream, np.float32).reshape(-1, width)


class RaySlices:
    """Slices in processes of the cluster that RAY_ADDRESS names, or of one on this machine.

    Each is on a machine of its own, and none on this one, where there are so many.
    """

    def __init__(self, parts: Sequence[Part], progress: Progress):
        """The last of `parts` is this process's own.

        Raises UserError where there is no Ray or no room, TinyserveError where processes do not start.
        """
        self.layers = [part.layers for part in parts]
        self.num_bytes = 0
        self._width = parts[0].config.hidden_size
        self._plan: CachePlan | None = None
        self._actors: list[Any] = []
        self._graph: Any = None  # Ray's, of what all of them do for a step: a tenth of the time of a call
        self._group: Any = None  # of their places
        self._session: _Session | None = _Session.join(progress)
        import ray

        self._ray = ray
        try:
            nbytes = [weight_bytes(part.config, part.dtype, part.layers) for part in parts[:-1]]
            for part, own in zip(parts[:-1], self._placed(nbytes, parts[0].num_threads or 1), strict=True):
                kind = ray.remote(
                    max_restarts=-1, max_task_retries=0, concurrency_groups={"ping": 1}, **own
                )(SliceActor)  # fmt: skip
                self._actors.append(kind.remote(part))
            hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
            places = [*self._started([actor.place.remote() for actor in self._actors]), _here()]
            self.places = [Place(hosts[place.node], place.free) for place in places]
            # On one machine they would take the cores from each other, unless they were told to leave some.
            together = max(Counter(place.node for place in self.places).values())
            self.are_parallel = together == 1 or together * (parts[0].num_threads or cores()) <= cores()
        except BaseException:
            self.close()
            raise

    def load(self, plan: CachePlan) -> Callable[[], list[Loaded]]:
        self._plan = plan
        loading = [actor.load.remote(plan) for actor in self._actors]

        def wait() -> list[Loaded]:
            try:
                loaded: list[Loaded] = self._get(loading, None)
                self._compile()
            except self._ray.exceptions.RayActorError as error:
                raise TinyserveError(
                    f"A process that was to load layers of the model has ended ({_reason(error)}): is its machine out "
                    "of memory?"
                ) from error
            return loaded

        return wait

    def send(self, message: Message) -> Callable[[], Array]:
        packed = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with self._losses():
            answer = self._graph.execute(packed)

        def wait() -> Array:
            with self._losses():
                stream: bytes = self._answer(answer)
            self.num_bytes += (len(packed) + len(stream)) * len(self._actors)
            return unpacked(stream, self._width)

        return wait

    def recover(self) -> None:
        assert self._plan is not None
        end = time.monotonic() + RECOVERY_SECONDS
        while True:
            try:
                self._graph.teardown()
                self._get([actor.load.remote(self._plan) for actor in self._actors], end - time.monotonic())
                self._compile()
                return
            except (self._ray.exceptions.RayActorError, TimeoutError) as error:
                if time.monotonic() > end:
                    raise EngineDeadError(
                        f"A process with layers of the model has not come back in {RECOVERY_SECONDS:.0f} s "
                        f"({_reason(error)})."
                    ) from error
                time.sleep(0.2)
            except TinyserveError as error:
                raise EngineDeadError(f"A process with layers of the model cannot load them again: {error}") from error

    def _compile(self) -> None:
        """Have Ray keep what passes between the processes in places of their own, and each wait for its turn."""
        from ray.dag import InputNode

        logging.getLogger("ray.dag.compiled_dag_node").setLevel(logging.CRITICAL)  # of those that die we hear ourselves
        with InputNode() as message:
            stream = None
            for actor in self._actors:
                stream = actor.run_packed.bind(message, stream)
        assert stream is not None
        places = PER_SLICE * len(self.layers) + 1 if self.are_parallel else 1
        try:
            self._graph = stream.experimental_compile(_buffer_size_bytes=_MESSAGE, _max_inflight_executions=places)
        except BaseException:
            for actor in self._actors:  # or a part of it waits in one of them for ever
                self._ray.kill(actor, no_restart=False)
            raise

    @contextmanager
    def _losses(self) -> Iterator[None]:
        """Raise CacheLostError for whatever goes wrong in one of the processes, or with it."""
        try:
            yield
        except Exception as error:
            raise CacheLostError(f"A process with layers of the model is lost ({_reason(error)}).") from error

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            if self._ray.is_initialized():  # else they have ended with it
                for actor in self._actors:
                    self._ray.kill(actor)
                if self._graph is not None:
                    self._graph.teardown()
                if self._group is not None:
                    self._ray.util.remove_placement_group(self._group)
            self._actors, self._graph, self._group = [], None, None
            session.leave()

    def _placed(self, nbytes: Sequence[int], threads: int) -> list[dict[str, Any]]:
        """Options of the actors, by which Ray puts each on a machine of its own; raises UserError."""
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        here = self._ray.get_runtime_context().get_node_id()
        others = [node for node in self._ray.nodes() if node["Alive"] and node["NodeID"] != here]
        if len(others) < len(nbytes):  # they share what there is, and work one after the other
            return [{"num_cpus": 0, "scheduling_strategy": "SPREAD"}] * len(nbytes)
        self._group = group = placement_group(
            [{"CPU": threads, "memory": each} for each in nbytes],
            strategy="STRICT_SPREAD",
            bundle_label_selector=[{"ray.io/node-id": f"!{here}"}] * len(nbytes),
        )
        if not group.wait(START_SECONDS):
            raise UserError(
                f"The Ray cluster has no {len(nbytes)} machines beside this one with {size(max(nbytes))} and {threads} "
                "free cores each: add machines, free some, or give another pipeline_parallel_size."
            )
        return [
            {"num_cpus": threads, "memory": each, "scheduling_strategy": PlacementGroupSchedulingStrategy(group, i)}
            for i, each in enumerate(nbytes)
        ]

    def _started(self, references: list[Any]) -> Any:
        """What new processes answer; raises TinyserveError where one does not."""
        try:
            return self._get(references, START_SECONDS)
        except (self._ray.exceptions.RayActorError, TimeoutError) as error:
            raise TinyserveError(f"A process for layers of the model does not start: {_reason(error)}.") from error

    def _get(self, references: list[Any], seconds: float | None) -> Any:
        """What they stand for; raises TimeoutError, Ray's errors of processes, and what was raised there as it was."""
        end = None if seconds is None else time.monotonic() + seconds
        left = references
        while left:  # by the second: an interruption comes between two waits
            if end is not None and time.monotonic() > end:
                raise TimeoutError(f"no answer in {seconds:.0f} s")
            _, left = self._ray.wait(left, num_returns=len(left), timeout=1.0)
        try:
            return self._ray.get(references)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error

    def _answer(self, reference: Any) -> Any:
        """What a step's last slice answers, however long it takes where all say that they live; raises TimeoutError."""
        while True:
            try:
                return reference.get(timeout=SILENCE)
            except self._ray.exceptions.RayChannelTimeoutError:
                reference._ray_get_called = False  # Ray lets one ask once, also where there was no answer
                self._ping()

    def _ping(self) -> None:
        """Have Ray restart those that say nothing; raises TimeoutError where there are any."""
        pings = {actor.ping.options(concurrency_group="ping").remote(): actor for actor in self._actors}
        _, silent = self._ray.wait(list(pings), num_returns=len(pings), timeout=PING_SECONDS)
        for ping in silent:
            self._ray.kill(pings[ping], no_restart=False)
        if silent:
            raise TimeoutError(f"no sign of life in {SILENCE + PING_SECONDS:.0f} s")


class _Session:
    """A connection to a cluster for all models of this process, made in a thread that lives as long: Ray ends its own
    processes with the thread that started them.
    """

    _lock = threading.Lock()
    _shared: "_Session | None" = None

    def __init__(self, progress: Progress) -> None:
        """Raises what `cluster.connect` raises."""
        self._users = 0
        self._ends, self._begun = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(progress,), name="tinyserve-ray", daemon=True)
        self._thread.start()
        try:
            while not self._begun.wait(0.1):  # where Ctrl-C comes through
                ...
        except BaseException:
            self._ends.set()
            progress(ENDING, 0, 0)
            self._thread.join()  # or processes would be left of a start that breaks off
            raise
        if self._error is not None:
            raise self._error

    @classmethod
    def join(cls, progress: Progress) -> "_Session":
        """The process's own, made if need be; to be left."""
        with cls._lock:
            if cls._shared is None:
                cls._shared = cls(progress)
            cls._shared._users += 1
            return cls._shared

    def leave(self) -> None:
        """The last to leave ends it, and a cluster of our own with it."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                _Session._shared = None
                self._ends.set()
                if self._thread is not threading.current_thread():  # which may be the one that collects a model
                    self._thread.join()

    def _run(self, progress: Progress) -> None:
        def told(stage: str, done: int, total: int) -> None:
            if self._ends.is_set():
                raise KeyboardInterrupt  # to whoever waited for it
            progress(stage, done, total)

        try:
            with connect(object_store=_STORE, progress=told):
                self._begun.set()
                self._ends.wait()
        except BaseException as error:
            self._error = error
        finally:
            self._begun.set()


def _here() -> Place:
    import ray

    return Place(ray.get_runtime_context().get_node_id(), available_memory())


def _reason(error: BaseException) -> str:
    """Its first line; of what was raised in another process that of its cause."""
    cause = getattr(error, "cause", None) or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
