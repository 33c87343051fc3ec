"""A fleet on several nodes, one of which loses its power in mid-load."""

import os
import signal
import sys
from pathlib import Path

import pytest
from command_line import Children
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
cut, end = threading.Event(), threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: cut.set())
signal.signal(signal.SIGTERM, lambda *_: (end.set(), cut.set()))
print(cluster.address, flush=True)
cut.wait()
if not end.is_set():
    cluster.remove_node(nodes[0], allow_graceful=False)
    cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    end.wait()
cluster.shutdown()
"""
CLOSED = {
    "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3",
}  # fmt: skip


def test_a_node_that_is_gone_is_not_noticed(tmp_path: Path, start: Children) -> None:
    model = write_model(tmp_path / "model")
    expected = answers_of_one_server(model)
    cluster = start(program=[sys.executable, "-c", NODES], **CLOSED)
    assert cluster.stdout is not None
    address = cluster.stdout.readline().decode().strip()
    arguments = ("--address", address, "--replicas", "2", "--threads", "1", "--dtype", "float32", "--port", "0")
    front = start("serve", f"tiny={model}", *arguments, **CLOSED)
    fleet = Fleet(front, cluster.pid).until_ready()
    streams = in_mid_answer(fleet)
    before = set(fleet.replicas())
    os.kill(cluster.pid, signal.SIGUSR1)
    assert streams.ended() == expected
    assert sum(fleet.metric("tinyserve_streams_spliced_total").values()) > 0
    fleet.until_ready()
    assert fleet.post("/v1/completions", {"prompt": "a", "max_tokens": 3}).status_code == 200
    assert len(before & set(fleet.replicas())) == 1
    front.terminate()
    assert front.wait(60) == 0
    family = descendants(cluster.pid)
    cluster.terminate()
    cluster.wait(60)
    assert not wait_until_gone(family, 90)
