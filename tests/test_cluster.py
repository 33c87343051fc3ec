"""Ray clusters: one of our own with closed doors, one that is joined, and what is refused."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import Children, Result, environment
from processes import alive, descendants, listeners, wait_until_gone

import tinyserve
from tinyserve import cluster
from tinyserve.errors import UserError

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")

HOST = """
import sys, time
from tinyserve.cluster import connect
with connect(cores=3, progress=lambda stage, *_: print(stage, file=sys.stderr)) as session:
    print(session.address, flush=True)
    time.sleep(600)
"""
# The same by way of a model in slices, whose cluster begins in a thread.
SLICES = """
import sys
from tinyserve import LLM
options = {"load_format": "dummy", "pipeline_parallel_size": 2, "distributed_executor_backend": "ray"}
LLM("smollm2-135m", **options, progress=lambda stage, *_: print(stage, file=sys.stderr))
"""
# What a process finds that joins; a refusal ends it as a command's would.
GUEST = """
import os, sys
from tinyserve.cluster import connect
from tinyserve.errors import TinyserveError
try:
    with connect(sys.argv[1], no_ray_auth="trust" in sys.argv) as session:
        for node in session.nodes:
            print(node.host, node.version, node.cores, node.is_authenticated, node.free_memory > 0, node.memory > 0)
        print(session.is_own, session.address)
except TinyserveError as error:
    print(f"tinyserve: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""
TOKEN = "a token of sixty-four characters would be better, but this will do"


@dataclass
class Host:
    """A process with a cluster of its own."""

    process: "subprocess.Popen[bytes]"
    address: str

    def join(self, *words: str, script: str = GUEST, **variables: str) -> Result:
        """Have another process join."""
        done = subprocess.run(
            [sys.executable, "-c", script, self.address, *words],
            capture_output=True, env=environment(**variables), timeout=120, check=False,
        )  # fmt: skip
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def started(start: Children, **variables: str) -> Host:
    process = start(program=[sys.executable, "-c", HOST], **variables)
    assert process.stdout is not None and process.stderr is not None
    address = process.stdout.readline().decode().strip()
    assert address, process.stderr.read().decode()
    return Host(process, address)


def ended(host: Host) -> set[int]:
    """Interrupt it as Ctrl-C does; the processes that it leaves behind."""
    family = descendants(host.process.pid)
    host.process.send_signal(signal.SIGINT)
    host.process.wait(60)
    return wait_until_gone(family, 10)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Children() as start:
        one = started(start, RAY_AUTH_TOKEN=TOKEN)
        yield one
        assert not ended(one)


def test_a_killed_owner_leaves_no_process_behind(start: Children) -> None:
    host = started(start)
    family = descendants(host.process.pid)
    assert len(family) >= 2
    host.process.kill()
    assert not wait_until_gone(family, 20)


# --- doors ------------------------------------------------------------------------------------------------------------


def test_an_own_cluster_listens_at_this_machines_own_address_alone(host: Host) -> None:
    family = descendants(host.process.pid)
    found = listeners(family | {host.process.pid})
    assert len(found) >= 3 and len(family) >= 2, found
    assert {address for address, _ in found} <= {"127.0.0.1", "::1"}


def test_who_has_the_token_joins_and_hears_what_the_node_has(host: Host) -> None:
    told = host.join(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert told.code == 0, told.err
    node, session = told.out.splitlines()
    assert node.split() == ["127.0.0.1", tinyserve.__version__, "3", "True", "True", "True"]
    assert session.split() == ["False", host.address]
    assert alive({host.process.pid})  # a guest that leaves ends nothing


@pytest.mark.parametrize("token", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another one"}])
def test_who_has_no_token_or_another_one_is_told_so(
    host: Host, token: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = time.monotonic()
    told = host.join(HOME=str(tmp_path), **token)  # where Ray looks for one
    assert told.code == 2
    assert "asks for a token" in told.sentence and "RAY_AUTH_TOKEN" in told.sentence
    assert time.monotonic() - begun < 60


def test_a_cluster_that_asks_for_no_token_is_refused_unless_it_is_said_to_be_guarded(
    start: Children, tmp_path: Path
) -> None:
    open_host = started(start, RAY_AUTH_MODE="disabled", HOME=str(tmp_path))
    told = open_host.join(HOME=str(tmp_path))
    assert told.code == 2
    assert "asks for no token" in told.sentence and "--no-ray-auth" in told.sentence
    assert open_host.join("trust", HOME=str(tmp_path)).code == 0
    assert not ended(open_host)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("tinyserve.__version__ = '9.9'", f"has tinyserve {tinyserve.__version__}, and this process 9.9"),
        ("tinyserve.cluster.kernels_hash = lambda: 'f00'", "has other kernels than this process"),
    ],
)
def test_a_node_that_computes_something_else_is_named(host: Host, change: str, sentence: str) -> None:
    script = f"import tinyserve, tinyserve.cluster\n{change}\n{GUEST}"
    told = host.join(script=script, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert told.code == 2
    assert told.sentence.startswith("The node 127.0.0.1") and sentence in told.sentence


def test_a_process_that_is_connected_stays_so_and_leaves_its_environment_as_it_was() -> None:
    script = """
import os
before = dict(os.environ)
import ray  # too early for the switch that closes the doors
from tinyserve.cluster import connect
for _ in range(2):  # a second cluster of one process, too
    with connect() as outer:
        with connect() as inner:
            assert outer.address == inner.address and outer.is_own and not inner.is_own
            assert [node.host for node in inner.nodes] == ["127.0.0.1"]
        assert ray.is_initialized()
    assert not ray.is_initialized()
left = {name for name in os.environ if os.environ[name] != before.get(name)} - {"RAY_CLIENT_MODE"}
assert not any("TOKEN" in name or "ENABLE" in name for name in left), left
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_the_example_of_the_page_runs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^## The cluster.*?```python\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.split()[0] == b"127.0.0.1" and done.stdout.split()[-1] == tinyserve.__version__.encode()
    assert not done.stderr, done.stderr.decode()  # nothing that Ray says is shown


# --- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", [HOST, SLICES], ids=["a cluster", "slices"])
def test_ctrl_c_while_it_starts_leaves_no_process_behind(program: str, start: Children) -> None:
    process = start(program=[sys.executable, "-c", program])
    while not descendants(process.pid):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    family = descendants(process.pid)
    while process.poll() is None:
        family |= descendants(process.pid)
        time.sleep(0.02)
    assert process.returncode == -signal.SIGINT or process.returncode == 1
    assert process.stderr is not None
    told = process.stderr.read().decode()
    assert "KeyboardInterrupt" in told and cluster.ENDING in told and "asking the nodes" not in told
    assert not wait_until_gone(family, 10)


# --- what is refused before anything starts -----------------------------------------------------------------------


def test_without_ray_one_sentence_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'tinyserve\[ray\]'"), cluster.connect():
        pass
    assert "RAY_AUTH_TOKEN" not in os.environ


@pytest.mark.parametrize("version", ["2.59.1", "2.70.0", "3.0.0.dev0", "odd"])
def test_another_version_of_ray_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    ray = types.ModuleType("ray")
    ray.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(UserError, match=f"Ray {version} is installed.*2.60"), cluster.connect():
        pass


def _closed() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        (_closed, "No Ray cluster answers at 127.0.0.1"),
        (lambda: "127.0.0.1:99999", "is 99999; it must be at most 65535"),
        (lambda: "no-such-host.invalid:6379", "No Ray cluster answers"),
        (lambda: "ray://127.0.0.1:10001", "it is host:port, or auto"),
        (lambda: "somewhere", "it is host:port, or auto"),
    ],
)
def test_an_address_that_does_not_answer_is_told_at_once(address: Callable[[], str], sentence: str) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=sentence), cluster.connect(address()):
        pass
    assert time.monotonic() - begun < 60  # where Ray itself waits for minutes


def test_what_listens_and_is_no_cluster_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 2.0)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(UserError, match="is no Ray cluster"), cluster.connect():
            pass


def test_a_system_without_sigaction_keeps_its_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cluster, "sys", types.SimpleNamespace(platform="win32"))
    monkeypatch.setattr(cluster.ctypes, "CDLL", None)
    with cluster._kept_handler(signal.SIGTERM):
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_of_any_shape_is_one_line() -> None:
    assert cluster._first_line(ValueError("\n one.\n two")) == "one"
    assert cluster._first_line(ValueError()) == "ValueError"
