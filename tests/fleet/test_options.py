"""What a fleet is told, what that means for its nodes, and what is refused before a model is loaded."""

import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import Shell

from tinyserve.cluster import Node, Session
from tinyserve.engine_options import EngineOptions
from tinyserve.errors import UserError
from tinyserve.fleet import run as module
from tinyserve.fleet.options import (
    FleetOptions,
    deployment_options,
    parse_replicas,
    places,
    plan,
    threads_of,
    version_of,
)
from tinyserve.models.config import ModelConfig, costs, parse_config
from tinyserve.server.options import ServeOptions
from tinyserve.tensor import _jit

GB = 1_000_000_000


def node(cores: int = 4, free: int = 8 * GB, memory: int = 7 * GB, host: str = "h") -> Node:
    return Node(
        id=host, host=host, version="1", python="3", kernels="k", free_memory=free, memory=memory, cores=cores,
        is_authenticated=True,
    )  # fmt: skip


@pytest.fixture
def config() -> ModelConfig:
    import checkpoints

    return parse_config(checkpoints.CONFIGS["llama"], "config.json")


def test_replicas_are_a_number_or_two() -> None:
    assert parse_replicas("3") == (3, 3)
    assert parse_replicas("2:8") == (2, 8)
    for wrong in ("0", "8:2", "a", "", "1:", ":2", "-1", "1:2:3", "1001", "1.5"):
        with pytest.raises(UserError, match="--replicas is"):
            parse_replicas(wrong)


def test_threads_are_an_equal_share_of_the_cores() -> None:
    assert threads_of(EngineOptions(), [8], 2) == 4
    assert threads_of(EngineOptions(), [2], 3) == 1
    assert threads_of(EngineOptions(), [8, 4], 4) == 2
    assert threads_of(EngineOptions(num_threads=3), [2], 9) == 3


def test_the_memory_of_a_node_is_shared_and_a_fifth_left(config: ModelConfig) -> None:
    engine = EngineOptions(max_model_len=64)
    each = plan("m", config, engine, None, [node()], 2)
    assert each.cores == each.engine.num_threads == 2
    assert each.engine.kv_cache_memory is not None
    weights = plan("m", config, EngineOptions(kv_cache_memory=10**6), None, [node()], 2).memory
    assert 0 < weights < each.memory < GB
    assert each.engine.kv_cache_memory <= 0.8 * 7 * GB
    assert plan("m", config, EngineOptions(kv_cache_memory=GB), None, [node()], 2).engine.kv_cache_memory == GB
    spread = plan("m", config, engine, None, [node(host="a"), node(host="b"), node(cores=0, host="head")], 2)
    assert spread.cores == 4


def test_replicas_in_slices(config: ModelConfig) -> None:
    """Each machine has as many slices as there are for it, and a replica is as large as its last one."""
    engine, nodes = EngineOptions(max_model_len=64), [node(host="a"), node(host="b")]
    whole = plan("m", config, engine, None, nodes, 2)
    cut = plan("m", config, replace(engine, pipeline_parallel_size=2), None, nodes, 2)
    assert cut.engine.pipeline_parallel_size == 2 and cut.engine.kv_cache_memory and whole.engine.kv_cache_memory
    assert cut.memory < 0.75 * whole.memory and cut.cores == 0, "its slices share the cores"
    assert abs(cut.engine.kv_cache_memory - whole.engine.kv_cache_memory) < 0.5 * whole.engine.kv_cache_memory
    weights = costs.weight_bytes(config, "w8a16")
    small = [node(free=int(1.1 * weights), host="a"), node(free=int(1.1 * weights), host="b")]
    with pytest.raises(UserError, match="One replica of m"):
        plan("m", config, engine, None, small, 1)
    assert plan("m", config, replace(engine, pipeline_parallel_size=2), None, small, 1).memory < weights
    with pytest.raises(UserError, match="2 slices of m on the node a"):
        plan("m", config, replace(engine, pipeline_parallel_size=2), None, small, 2)


def test_more_replicas_than_cores_share_them(config: ModelConfig) -> None:
    each = plan("m", config, EngineOptions(), None, [node(cores=2)], 5)
    assert each.engine.num_threads == 1 and each.cores == 0


@pytest.mark.parametrize(
    ("nodes", "options", "sentence"),
    [
        ([node(free=10_000)], {}, "may take .* memory each, and the weights alone are"),
        ([node(memory=10_000)], {}, "the weights alone"),
        ([node(), node(free=10_000, host="small")], {}, "on the node small"),
        ([node()], {"kv_cache_memory": 5 * GB}, "weights and cache are 5.00 GB.*fewer --replicas"),
        ([node(cores=0)], {}, "No node"),
    ],
)
def test_too_little_is_said_with_the_way_out(
    config: ModelConfig, nodes: list[Node], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        plan("m", config, EngineOptions(**options), None, nodes, 2)


def test_what_ray_serve_is_told(config: ModelConfig) -> None:
    """Names what of Ray is experimental or read from the environment: where one has moved, this fails."""
    from ray.serve import RunTarget, context
    from ray.serve._private import constants
    from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
    from ray.serve.handle import DeploymentHandle

    from tinyserve.fleet.handle import ENVIRONMENT

    engine = EngineOptions(max_num_seqs=8)
    each = plan("m", config, engine, None, [node()], 2)
    told = deployment_options(FleetOptions(replicas=(2, 2)), each, 30, ENVIRONMENT)
    assert told["num_replicas"] == 2 and told["max_ongoing_requests"] == places(engine) == 12
    assert told["ray_actor_options"]["num_cpus"] == 2 and told["ray_actor_options"]["memory"] == each.memory
    assert ConsistentHashRouter.__name__ in told["request_router_config"].request_router_class
    scaled = deployment_options(FleetOptions(replicas=(1, 4)), each, 30, {})
    assert "num_replicas" not in scaled and "runtime_env" not in scaled["ray_actor_options"]
    assert version_of(engine, 1) == version_of(EngineOptions(max_num_seqs=8), 1) != version_of(engine, 2)
    assert scaled["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 6}
    for name in ENVIRONMENT:
        assert hasattr(constants, name), name
    assert {"replica_id", "rank"} <= set(context.ReplicaContext.__dataclass_fields__)
    assert RunTarget and hasattr(DeploymentHandle, "broadcast")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Shell(monkeypatch, capsys)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--replicas", "none"], "--replicas is 'none'"),
        (["--replicas", "2", "--replica-timeout", "0"], "--replica-timeout is 0"),
        (["--replicas", "2", "--retries", "-1"], "--retries is -1"),
        (["--join"], "--join is for a cluster that runs already"),
        (["--replicas", "2", "--leave"], "--leave is for a cluster that runs already"),
        (["--leave"], "--leave goes with --replicas"),
        (["--no-ray-auth"], "--no-ray-auth goes with --replicas"),
        (["--replicas", "2", "--memory", "1"], "--kv-cache-memory bounds the cache of each replica"),
        (["smollm2-135m", "--replicas", "2"], "serves one model, and 2 are given"),
        (["--replicas", "2", "--host", "0.0.0.0"], "lets other machines in"),
        (["--replicas", "2", "--address", "nowhere"], "it is host:port, or auto"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    shell: Shell, folder_of: Callable[[str], Path], arguments: list[str], sentence: str
) -> None:
    told = shell("serve", folder_of("llama"), "--port", "0", *arguments)
    assert told.code == 2 and sentence in told.sentence


def test_a_port_that_is_taken_is_told_before_a_cluster_starts(
    shell: Shell, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "connect", None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        told = shell("serve", folder_of("llama"), "--replicas", "2", "--port", str(other.getsockname()[1]))
    assert told.code == 2 and "Is another server running there?" in told.sentence


def test_a_model_that_does_not_exist_is_told_before_a_cluster_starts(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "connect", None)
    told = shell("serve", tmp_path, "--replicas", "2", "--port", "0")
    assert told.code == 2 and "config.json" in told.sentence


def test_more_replicas_than_cores_are_told_and_not_refused(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cores = _jit.usable_cores()
    asked: dict[str, Any] = {}

    @contextmanager
    def connect(address: str | None, **options: Any) -> Iterator[Session]:
        asked.update(options, address=address)
        yield Session(address="127.0.0.1:1", nodes=(node(cores=options["cores"]),), is_own=True)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(module, "connect", connect)
    monkeypatch.setattr(module.run, "run", lambda *_: 0)
    options = ServeOptions(models={"m": str(folder_of("llama"))}, port=0)
    with caplog.at_level(logging.WARNING):
        assert module.serve(options, FleetOptions(replicas=(cores + 1, cores + 1))) == 0
    assert asked["cores"] == cores + 1 and asked["address"] is None
    assert f"{cores + 1} replicas with 1 thread each share {cores} core" in caplog.text
