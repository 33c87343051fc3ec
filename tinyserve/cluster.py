"""A Ray cluster: one of our own behind closed doors or one that is joined, and what its nodes have.

The only file that calls ray.init. It knows machines, no model.
"""

import ctypes
import hashlib
import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tinyserve.errors import TinyserveError, UserError
from tinyserve.progress import Progress, silent
from tinyserve.tensor.cgroups import available_memory

RAY_VERSIONS = ((2, 60), (2, 70))  # from the first, up to the second: pyproject.toml says the same
OBJECT_STORE = 80_000_000  # bytes of shared memory, the least that Ray takes: nothing large goes there
CONNECT_SECONDS = 10.0  # until an address has to have answered
ENDING = "ending, once Ray has begun"  # a stage: what is told after a Ctrl-C
ASK_SECONDS = 60.0  # until each node has to have told what it has: a worker of its own starts for it

# Before Ray is imported, unless the user has set them.
# Of what its processes do Ray prints pages to stdout, whatever it was told; who asked for them says what is amiss.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
_TOKEN_MODE, _TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
# In spite of its name the one switch by which Ray listens at 127.0.0.1 alone.
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_IS_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # what a cluster's head answers to
# What is left of a cluster whose owner is killed are the agents of its node: they try for a minute to tell somebody.
_REAPER = """
import os, signal, sys
agents = [os.pidfd_open(int(pid)) for pid in sys.stdin.readline().split()]
sys.stdin.read()  # until its owner has ended, in whatever way
for agent in agents:
    try:
        signal.pidfd_send_signal(agent, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""
# One token for all clusters of this process, as Ray keeps the first that it reads.
_own_token = secrets.token_hex(32)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of a cluster: what it runs, and what Ray may hand out of it."""

    id: str
    host: str
    version: str  # of tinyserve
    python: str
    kernels: str  # a hash of tinyserve/tensor/*.py, which decide the bits of an answer
    free_memory: int  # bytes, when it was asked
    memory: int  # bytes that Ray hands out
    cores: int
    is_authenticated: bool  # it lets nobody in without the cluster's token


@dataclass(frozen=True, kw_only=True)
class Session:
    """A connection to a cluster, with its nodes as they were when it was made."""

    address: str  # host:port
    nodes: tuple[Node, ...]
    is_own: bool  # started by us, and gone when the session ends


@contextmanager
def connect(
    address: str | None = None,
    *,
    no_ray_auth: bool = False,
    cores: int | None = None,
    object_store: int = OBJECT_STORE,
    progress: Progress | None = None,
) -> Iterator[Session]:
    """Start a cluster of our own on this machine, or join one: host:port, "auto", or what RAY_ADDRESS says.

    An own one ends with the block, or with its process; call it in a thread that lives as long. `cores`, and the bytes
    of its `object_store`, are what an own cluster is told to have. A process that is connected already stays so. Raises
    UserError without Ray or with another version of it, for an address that does not answer, for nodes that run
    something else than this process, and for a cluster that asks for no token unless `no_ray_auth`.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    with _environment(_settings(address)):
        ray = _import_ray()
        if ray.is_initialized():
            yield _session(ray, is_own=False, no_ray_auth=no_ray_auth)
            return
        progress = progress or silent
        with ExitStack() as ended:
            try:
                with _held_interrupts(progress):
                    progress("starting a Ray cluster" if address is None else f"joining {address}", 0, 0)
                    if address is None:
                        _start(ray, cores, object_store)
                        ended.enter_context(_reaped_agents())
                    else:
                        _join(ray, address)
                progress("asking the nodes of the cluster", 0, 0)
                yield _session(ray, is_own=address is None, no_ray_auth=no_ray_auth)
            finally:
                with _held_interrupts(silent):
                    ray.shutdown(wait_for_processes=True)


def _settings(address: str | None) -> dict[str, str]:
    if address is None:
        return {**_QUIET, **_LOOPBACK, _TOKEN_MODE: "token", _TOKEN: _own_token}
    host = address.rpartition(":")[0].strip("[]")
    # Ray looks for the node of this process by its address, which must be as the cluster was told.
    return {**_QUIET, **(_LOOPBACK if host in ("127.0.0.1", "localhost") else {})}


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    """These variables until the block ends, but for those that the user has set."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    if "RAY_AUTH_TOKEN_PATH" in os.environ:
        added.pop(_TOKEN, None)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _import_ray() -> Any:
    imported = "ray" in sys.modules
    try:
        import ray
    except ImportError as error:
        raise UserError(f"Clusters need Ray ({error}): pip install 'tinyserve[ray]'.") from None
    try:
        version = tuple(int(part) for part in ray.__version__.split(".")[:2])
    except ValueError:
        version = (0, 0)
    (low, high) = RAY_VERSIONS
    if not low <= version < high:
        raise UserError(
            f"Ray {ray.__version__} is installed, and tinyserve is made for {low[0]}.{low[1]} and later below "
            f"{high[0]}.{high[1]}: pip install 'tinyserve[ray]'."
        )
    if imported and not ray.is_initialized():
        _read_environment_again()
    return ray


def _read_environment_again() -> None:
    """Whoever has imported Ray before us has had it read its settings too early."""
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(*_LOOPBACK, sys.platform not in ("win32", "darwin"))
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")


def _start(ray: Any, cores: int | None, object_store: int) -> None:
    """A cluster of our own. Raises TinyserveError where Ray cannot start one."""
    try:
        # Without "local" it would join whatever cluster a file in the temporary folder names.
        ray.init(
            address="local", num_cpus=cores, include_dashboard=False, object_store_memory=object_store,
            log_to_driver=False, logging_level="error",
        )  # fmt: skip
    except Exception as error:
        raise TinyserveError(f"Ray could not start a cluster on this machine: {_first_line(error)}.") from error
    node_host = ray.nodes()[0]["NodeManagerAddress"]
    if os.environ.get(*_LOOPBACK) == "0" and node_host != "127.0.0.1":
        raise TinyserveError(f"Ray listens at {node_host} in place of 127.0.0.1, where others may reach it.")


@contextmanager
def _reaped_agents() -> Iterator[None]:
    """Have a process end the agents of our own cluster if this one is killed."""
    if not hasattr(os, "pidfd_open"):  # Linux has it
        yield
        return
    import psutil  # Ray brings it

    raylets = [child for child in psutil.Process().children() if child.name() == "raylet"]
    agents = " ".join(str(child.pid) for raylet in raylets for child in raylet.children())
    command = [sys.executable, "-I", "-S", "-c", _REAPER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, encoding="ascii") as reaper:
        assert reaper.stdin is not None
        reaper.stdin.write(f"{agents}\n")
        reaper.stdin.flush()
        yield


def _join(ray: Any, address: str) -> None:
    if address != "auto":
        _check_answers(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except Exception as error:
        kind = type(error).__name__
        if "Authentication" in kind or "auth" in str(error).lower():
            raise UserError(_asks_for_token(address)) from error
        if "Version mismatch" in str(error):
            raise UserError(
                f"The Ray cluster at {address} runs another version of Ray or of Python: {_mismatch(error)}. Make all "
                "nodes from one image."
            ) from error
        raise UserError(f"The Ray cluster at {address} cannot be joined: {_first_line(error)}.") from error


def _check_answers(address: str) -> None:
    """Raise UserError unless this is host:port of a server that speaks as Ray does: it waits minutes for others."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        raise UserError(f"The address {address!r:.80} is none of a Ray cluster: it is host:port, or auto.")
    if int(port) > 65535:  # of which gRPC would ask another: modulo 65536
        raise UserError(f"The port of {address!r:.80} is {port:.20}; it must be at most 65535.")
    way_out = "Is it running (ray status), and is its port open to this machine?"
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS / 2).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"No Ray cluster answers at {address} ({_first_line(error)}). {way_out}") from None
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("0", "false", ""):
        return  # whose keys are Ray's to read
    import grpc

    token = _token()
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_SECONDS / 2)
            headers = [("authorization", f"Bearer {token}")] if token else []
            channel.unary_unary(_IS_ALIVE)(b"", timeout=CONNECT_SECONDS / 2, metadata=headers)
        except grpc.FutureTimeoutError:
            raise UserError(f"What listens at {address} is no Ray cluster. {way_out}") from None
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise UserError(_asks_for_token(address)) from None
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise UserError(f"What listens at {address} is no Ray cluster. {way_out}") from None


def _token() -> str | None:
    """The token that Ray will send, from where it looks for it."""
    if os.environ.get(_TOKEN_MODE, "token").lower() != "token":
        return None
    if token := os.environ.get(_TOKEN):
        return token.strip()
    try:
        file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError, RuntimeError):
        return None


def _asks_for_token(address: str) -> str:
    return (
        f"The Ray cluster at {address} asks for a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or "
        "RAY_AUTH_TOKEN_PATH, a file) to the one it was started with."
    )


@contextmanager
def _held_interrupts(progress: Progress) -> Iterator[None]:
    """Let a Ctrl-C wait until the block ends, as Ray would leave its processes, and say so; a second one does not wait.

    Ray takes SIGTERM over, which is given back.
    """
    if threading.current_thread() is not threading.main_thread():
        with _kept_handler(signal.SIGTERM):
            yield
        return
    interrupted = False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True
        progress(ENDING, 0, 0)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if interrupted:
            raise KeyboardInterrupt


@contextmanager
def _kept_handler(number: int) -> Iterator[None]:
    """Give a signal back to whoever had it, from a thread that Python does not let say so."""
    if sys.platform == "win32":  # which has no sigaction, and where nobody can send SIGTERM
        yield
        return
    libc, kept = ctypes.CDLL(None), ctypes.create_string_buffer(1024)  # a struct sigaction is far smaller
    is_known = libc.sigaction(int(number), None, kept) == 0
    try:
        yield
    finally:
        if is_known:
            libc.sigaction(int(number), kept, None)


# --- what the nodes have ----------------------------------------------------------------------------------------------


def describe_node() -> dict[str, Any]:
    """What runs on the node of this process, and its free memory in bytes."""
    from tinyserve import __version__

    return {
        "version": __version__,
        "python": platform.python_version(),
        "kernels": kernels_hash(),
        "free_memory": available_memory(),
        "is_authenticated": os.environ.get(_TOKEN_MODE, "").lower() == "token",
    }


def kernels_hash() -> str:
    """A hash of the files that decide which bits are computed."""
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parent / "tensor").glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _session(ray: Any, *, is_own: bool, no_ray_auth: bool) -> Session:
    """Ask all nodes, and refuse what cannot work together. Raises UserError."""
    address = ray.get_runtime_context().gcs_address
    nodes = tuple(_ask(ray, address))
    here = describe_node()
    for node in nodes:
        for what, name in (("version", "tinyserve"), ("python", "Python")):
            if getattr(node, what) != here[what]:
                raise UserError(
                    f"The node {node.host} has {name} {getattr(node, what)}, and this process {here[what]}: make all "
                    "nodes from one image."
                )
        if node.kernels != here["kernels"]:
            raise UserError(
                f"The node {node.host} has other kernels than this process (tinyserve/tensor, {node.kernels} and "
                f"{here['kernels']}), though the same version: make all nodes from one image."
            )
    if not is_own and not no_ray_auth and not all(node.is_authenticated for node in nodes):
        raise UserError(
            f"The Ray cluster at {address} asks for no token: whoever reaches its ports can run programs there. Start "
            "it with RAY_AUTH_MODE=token (docs/distributed.md), or say --no-ray-auth where something else keeps the "
            "door."
        )
    return Session(address=address, nodes=nodes, is_own=is_own)


def _ask(ray: Any, address: str) -> Iterator[Node]:
    """Have one task on each node tell what it has; raises UserError that names one without tinyserve, or too slow."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(_question())
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[task.options(scheduling_strategy=there).remote()] = node
    if not asked:
        raise UserError(f"The Ray cluster at {address} has no node that is alive.")
    _, late = ray.wait(list(asked), num_returns=len(asked), timeout=ASK_SECONDS)
    if late:
        raise UserError(
            f"The node {asked[late[0]]['NodeManagerAddress']} of the Ray cluster at {address} has started no task in "
            f"{ASK_SECONDS:.0f} s: is it overloaded, or out of memory?"
        )
    for reference, node in asked.items():
        host, resources = node["NodeManagerAddress"], node["Resources"]
        try:
            told = ray.get(reference)
        except Exception as error:
            raise UserError(f"The node {host} could not tell what it has: {_last_line(error)}.") from error
        if told is None:
            raise UserError(f"The node {host} has no tinyserve of this version: make all nodes from one image.")
        yield Node(
            id=node["NodeID"], host=host, cores=int(resources.get("CPU", 0)), memory=int(resources.get("memory", 0)),
            **told,
        )  # fmt: skip


def _question() -> Callable[[], dict[str, Any] | None]:
    """The task, as a function that travels by its code: a node that cannot import this file must be able to answer."""

    def question() -> dict[str, Any] | None:
        try:
            from tinyserve.cluster import describe_node as describe
        except ImportError:
            return None
        return describe()

    return question


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _last_line(error: BaseException) -> str:
    """Of a task's error, which has the traceback of the other process in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")


def _mismatch(error: BaseException) -> str:
    """What Ray says of two versions, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ", ".join(line.rstrip(".") for line in lines[1:]) or _first_line(error)
