"""Metrics for Prometheus: the engines' counters as they are, and histograms of request latencies.

Each server has a registry of its own, so that two in one process do not add up.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from tinyserve.engine import EngineStats
from tinyserve.scheduling.sequence import Metrics
from tinyserve.server.access_log import count_tokens
from tinyserve.server.pool import ModelPool

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
_GAPS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)

# Of EngineStats: the metric's name, its help, and the count.
_GAUGES = {
    "tinyserve_requests_running": ("Answers that are computed now.", lambda s: s.num_running),
    "tinyserve_requests_waiting": ("Answers that wait for a place.", lambda s: s.num_waiting),
    "tinyserve_cache_blocks": ("Blocks of the cache.", lambda s: s.num_blocks),
    "tinyserve_cache_blocks_used": ("Blocks that requests hold.", lambda s: s.num_blocks - s.num_free_blocks),
}
_COUNTERS = {
    "tinyserve_requests": ("Answers that have ended.", lambda s: s.requests),
    "tinyserve_prompt_tokens": ("Prompt tokens of requests that have begun.", lambda s: s.prompt_tokens),
    "tinyserve_cached_prompt_tokens": ("Those of them that were in the cache.", lambda s: s.cached_tokens),
    "tinyserve_output_tokens": ("Tokens of answers.", lambda s: s.output_tokens),
    "tinyserve_preemptions": ("How often a request had to give up its blocks.", lambda s: s.preemptions),
    "tinyserve_draft_tokens": ("Draft tokens that were checked.", lambda s: s.draft_tokens),
    "tinyserve_accepted_tokens": ("Those of them that were accepted.", lambda s: s.accepted_tokens),
}


class ServerMetrics:
    """The metrics of one server."""

    def __init__(self, pool: ModelPool):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(("model",), lambda: _engines(pool)))
        labels = ("model",)
        self._first = Histogram(
            "tinyserve_time_to_first_token_seconds", "From a request's arrival to its first token.", labels,
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._queue = Histogram(
            "tinyserve_queue_seconds", "From a request's arrival to its first step.", labels,
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._gap = Histogram(
            "tinyserve_inter_token_seconds", "From one token of an answer to the next.", labels,
            buckets=_GAPS, registry=self.registry,
        )  # fmt: skip
        self._ends = Counter(
            "tinyserve_answers", "Answers, by why they ended.", ("model", "finish_reason"), registry=self.registry
        )
        self._responses = count_responses(self.registry)

    def answered(self, model: str, metrics: Metrics, reason: str | None) -> None:
        """Record the latencies and the finish reason of one answer."""
        if metrics.queue_time is not None:
            self._queue.labels(model).observe(metrics.queue_time)
        if metrics.time_to_first_token is not None:
            self._first.labels(model).observe(metrics.time_to_first_token)
        gaps = self._gap.labels(model)
        times = metrics.token_times
        for before, after in pairwise(times):
            gaps.observe(after - before)
        self._ends.labels(model, reason or "abort").inc()

    @contextmanager
    def watch(self, model: str, answers: int) -> "Iterator[Watch]":
        """Count the answers of one prompt; those that have not ended when the block does count as aborted."""
        watch = Watch(self, model)
        try:
            yield watch
        finally:
            for _ in range(answers - watch.count):
                self._ends.labels(model, "abort").inc()

    def responded(self, path: str, status: int) -> None:
        """Count a response that has begun."""
        self._responses.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class Watch:
    """Records the answers of one prompt as they end."""

    def __init__(self, metrics: ServerMetrics, model: str):
        self._metrics, self._model, self.count = metrics, model, 0

    def ended(self, metrics: Metrics, reason: str | None) -> None:
        count_tokens(0 if self.count else metrics.prompt_tokens, metrics.output_tokens)
        self.count += 1
        self._metrics.answered(self._model, metrics, reason)


def count_responses(registry: CollectorRegistry) -> Counter:
    """A counter of responses by path and status."""
    return Counter("tinyserve_http_responses", "Responses, by path and status.", ("path", "status"), registry=registry)


def _engines(pool: ModelPool) -> dict[tuple[str, ...], EngineStats]:
    return {(model.name,): model.engine.stats() for model in pool.models.values() if model.engine is not None}


class EngineCollector(Collector):
    """Reads engines' own counters at each scrape: `stats` gives those of each by the values of its labels."""

    def __init__(self, labels: Sequence[str], stats: Callable[[], Mapping[tuple[str, ...], EngineStats]]):
        self._labels, self._stats = labels, stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, (help_, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, help_, labels=self._labels)
            for labels, one in stats.items():
                gauge.add_metric(labels, value(one))
            yield gauge
        for name, (help_, value) in _COUNTERS.items():
            counter = CounterMetricFamily(name, help_, labels=self._labels)
            for labels, one in stats.items():
                counter.add_metric(labels, value(one))
            yield counter
        steps = SummaryMetricFamily("tinyserve_step_seconds", "Steps of the engine.", labels=self._labels)
        for labels, one in stats.items():
            steps.add_metric(labels, one.steps, one.step_seconds)
        yield steps
