"""A fleet, and a batch, on several nodes, one of which loses its power in mid-load."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from command_line import Children, run
from fleets import Fleet, answers_of_one_server, in_mid_answer, write_model
from processes import descendants, wait_until_gone

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")

# Nodes on one machine; a signal ends one as a power cut would, and another takes its place.
NODES = """
import signal, threading
from ray.cluster_utils import Cluster
each = {"object_store_memory": 80_000_000, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **each})
nodes = [cluster.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(2)]
cut, end = threading.Semaphore(0), threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: cut.release())
signal.signal(signal.SIGTERM, lambda *_: (end.set(), cut.release()))
print(cluster.address, flush=True)
while cut.acquire() and not end.is_set():
    cluster.remove_node(nodes.pop(0), allow_graceful=False)
    nodes.append(cluster.add_node(num_cpus=1, object_store_memory=80_000_000))
cluster.shutdown()
"""
CLOSED = {
    "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3",
}  # fmt: skip


class Nodes(NamedTuple):
    address: str
    pid: int

    def cut(self) -> None:
        """The first node is gone at once, and after a while there is another one."""
        os.kill(self.pid, signal.SIGUSR1)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two that compute, and a head that does not; in the end no process is left."""
    with Children() as start:
        cluster = start(program=[sys.executable, "-c", NODES], **CLOSED)
        assert cluster.stdout is not None
        yield Nodes(cluster.stdout.readline().decode().strip(), cluster.pid)
        family = descendants(cluster.pid)
        cluster.terminate()
        cluster.wait(60)
        assert not wait_until_gone(family, 90)


def test_a_node_that_is_gone_is_not_noticed(nodes: Nodes, tmp_path: Path, start: Children) -> None:
    model = write_model(tmp_path / "model")
    expected = answers_of_one_server(model, 24)
    arguments = ("--address", nodes.address, "--replicas", "2", "--threads", "1", "--dtype", "float32", "--port", "0")
    front = start("serve", f"tiny={model}", *arguments, **CLOSED)
    fleet = Fleet(front, nodes.pid).until_ready()
    streams = in_mid_answer(fleet, 24)
    before = set(fleet.replicas())
    nodes.cut()
    assert streams.ended() == expected
    assert sum(fleet.metric("tinyserve_streams_spliced_total").values()) > 0
    fleet.until_ready()
    assert fleet.post("/v1/completions", {"prompt": "a", "max_tokens": 3}).status_code == 200
    assert len(before & set(fleet.replicas())) == 1
    front.terminate()
    assert front.wait(60) == 0


def test_a_batch_whose_node_is_gone_has_every_row_once(nodes: Nodes, tmp_path: Path, start: Children) -> None:
    model = write_model(tmp_path / "model")
    rows, journals = tmp_path / "in.jsonl", tmp_path / "there.jsonl.parts" / "_journal"
    rows.write_text("".join(json.dumps({"prompt": f"{i}", "i": i}) + "\n" for i in range(3000)))
    flags = ("--model", model, "--dtype", "float32", "--threads", "1", "--temp", "3", "--max-tokens", "20")
    batch = start(
        "batch", rows, tmp_path / "there.jsonl", *flags, "--workers", "2", "--address", nodes.address, **CLOSED
    )
    assert batch.stderr is not None

    def workers() -> set[int]:
        """The processes that have answered something."""
        paths = journals.glob("*.jsonl") if journals.exists() else ()
        names = {path.name.split(".")[1] for path in paths if path.stat().st_size}
        return {int(name.split("-")[-2][8:]) for name in names}  # behind a part of its node

    end = time.monotonic() + 120
    while len(there := workers()) < 2:
        assert batch.poll() is None, batch.stderr.read()
        assert time.monotonic() < end
        for pid in there:
            os.kill(pid, signal.SIGSTOP)  # or it has answered everything before there is another one
        time.sleep(0.02)
    for pid in there:
        os.kill(pid, signal.SIGCONT)
    nodes.cut()
    assert batch.poll() is None and len(workers()) == 2
    assert batch.wait(240) == 0, batch.stderr.read()
    assert not workers(), "its folder is put away"
    here = run("batch", rows, tmp_path / "here.jsonl", *flags)
    assert here.code == 0, here.err
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
