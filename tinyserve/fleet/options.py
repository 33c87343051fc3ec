"""How a fleet is told to serve, and what that means for Ray: processors, memory and bounds of each replica.

Imports nothing that only a fleet needs, so that a command can show defaults.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tinyserve.cluster import Node
from tinyserve.engine_options import EngineOptions
from tinyserve.errors import UserError
from tinyserve.progress import size

if TYPE_CHECKING:
    from tinyserve.models.config import ModelConfig

MOST_REPLICAS = 1000
HEALTH_PERIOD, HEALTH_TIMEOUT = 5.0, 10.0  # seconds, of Serve's own checks
_FREE = 0.8  # of a node's free memory that replicas may take: Ray ends what drives it above 95 %
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """How many replicas, and where."""

    replicas: tuple[int, int] = (1, 1)  # the least and the most
    address: str | None = None  # of a Ray cluster; None for one of our own
    join: bool = False  # what runs there already
    leave: bool = False  # it running at the end
    no_ray_auth: bool = False
    replica_timeout: float = 30.0  # seconds of silence after which a replica is given up
    retries: int = 2  # of a request whose replica was lost


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What each replica gets."""

    engine: EngineOptions  # with its threads and the memory of its cache
    cores: int  # that it pins itself to; 0 where there are not enough for all
    memory: int  # bytes, of weights and cache


def parse_replicas(text: str) -> tuple[int, int]:
    """N, or MIN:MAX; raises UserError."""
    least, colon, most = text.partition(":")
    try:
        pair = int(least), int(most if colon else least)
    except ValueError:
        pair = (0, 0)
    if not 1 <= pair[0] <= pair[1] <= MOST_REPLICAS:
        raise UserError(
            f"--replicas is {text!r:.40}; it must be a number from 1 to {MOST_REPLICAS}, or MIN:MAX, as 2:8."
        )
    return pair


def threads_of(engine: EngineOptions, cores: Sequence[int], replicas: int) -> int:
    """Threads of each replica: as many as were asked for, else an equal share of the smallest node's cores."""
    if engine.num_threads is not None:
        return engine.num_threads
    return max(1, min(cores) // math.ceil(replicas / len(cores)))


def plan(
    name: str, config: "ModelConfig", engine: EngineOptions, packed: str | None, nodes: Sequence[Node], replicas: int
) -> Plan:
    """Share out the nodes; raises UserError where their memory is too little for so many replicas."""
    from tinyserve.models.cache_plan import CacheNeeds, plan_cache
    from tinyserve.pipeline.partition import part_of, partition

    nodes = [node for node in nodes if node.cores]
    if not nodes:
        raise UserError("No node of the Ray cluster has processors to give.")
    threads = threads_of(engine, [node.cores for node in nodes], replicas)
    on_each = math.ceil(replicas * engine.pipeline_parallel_size / len(nodes))
    resolved = engine.resolved(packed)
    needs = CacheNeeds(config, resolved.dtype, resolved.kv_cache_dtype, resolved.block_size, resolved.max_num_seqs)
    slices = [
        replace(needs, layers=layers) for layers in partition(config, resolved.dtype, engine.pipeline_parallel_size)
    ]
    weights = max(one.weight_nbytes for one in slices)
    part = max(part_of([one], slices) for one in slices)  # of the cache, at the most
    least = min(nodes, key=lambda node: min(node.free_memory, node.memory))
    share = int(min(least.free_memory * _FREE, least.memory) / on_each)
    wanted = weights + int((engine.kv_cache_memory or 0) * part)
    if wanted >= share:
        what = "weights and cache" if engine.kv_cache_memory else "the weights alone"
        raise UserError(
            f"{_many(on_each, 'slice' if len(slices) > 1 else 'replica')} of {name} on the node {least.host} may take "
            f"{size(share)} of memory each, and {what} are {size(wanted)}: ask for "
            "fewer --replicas, or for a smaller --dtype or --kv-cache-memory."
        )
    cache = engine.kv_cache_memory or int((share - weights) / part)
    whole = plan_cache(needs, engine.max_model_len, cache)
    own = slices[-1].plan(whole.num_blocks, whole.max_model_len, whole.num_snapshots, None)  # of the replica's process
    fits = all(on_each * threads <= node.cores for node in nodes)
    given = replace(engine, num_threads=threads, kv_cache_memory=cache)
    return Plan(engine=given, cores=threads if fits else 0, memory=slices[-1].weight_nbytes + own.nbytes)


def _many(count: int, what: str) -> str:
    return f"One {what}" if count == 1 else f"{count} {what}s"


def places(engine: EngineOptions) -> int:
    """Requests that a replica takes at a time: what its engine runs, and half as many that are ready to follow."""
    return engine.max_num_seqs + engine.max_num_seqs // 2


def version_of(*told: object) -> str:
    """A hash of what a fleet is told: where it is equal nothing has to be changed."""
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def deployment_options(
    fleet: FleetOptions, each: Plan, drain_timeout: float, environment: dict[str, str]
) -> dict[str, Any]:
    """The options of the deployment, as Ray Serve names them."""
    from ray.serve.config import RequestRouterConfig

    least, most = fleet.replicas
    threads = each.engine.num_threads or 1
    options: dict[str, Any] = {
        "max_ongoing_requests": places(each.engine),
        "ray_actor_options": {
            "num_cpus": threads,
            "memory": each.memory,
            **({"runtime_env": {"env_vars": environment}} if environment else {}),
        },
        "graceful_shutdown_timeout_s": max(1.0, drain_timeout),
        "health_check_period_s": HEALTH_PERIOD,
        "health_check_timeout_s": HEALTH_TIMEOUT,
        "max_constructor_retry_count": 1,  # what is wrong with a model is wrong the second time, too
        "request_router_config": RequestRouterConfig(
            request_router_class=_ROUTER, request_router_kwargs={"num_fallback_replicas": MOST_REPLICAS}
        ),
    }
    if least == most:
        return options | {"num_replicas": most}
    # Above three quarters of what its engine runs, another replica makes answers faster.
    target = max(1, each.engine.max_num_seqs * 3 // 4)
    return options | {
        "autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": target}
    }
