"""Prometheus metrics under SGLang's names for requests of every task, and the text of ``GET /metrics``.

Names and labels are those of SGLang's collector, so that its dashboards work; the label ``task`` is an addition.
Counters and histograms are updated when a request ends; gauges are computed when ``/metrics`` is read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trunkline.core.discovery import Plugin, Provided
from trunkline.core.errors import describe_error
from trunkline.core.types import Reply, RequestObserver, on_replica

from .contracts import Failures

if TYPE_CHECKING:
    from trunkline.core.engine.messages import Load

    from .transport import Transport

log = logging.getLogger("trunkline.server")

LABELS = ("model_name", "task")
# Seconds, for requests from a short prompt on an idle GPU to a long one at the end of a queue.
WHOLE = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100, 200, 400, 800)


class CoreMetrics(Collector, RequestObserver):
    """Requests since the start by model and task, load of the models, state of the engine, and failures of plugins."""

    def __init__(
        self,
        transport: Transport,
        throughput: Callable[[], float],
        first_name: Callable[[str], str],
        failures: Failures,
    ) -> None:
        """``transport``: to the engine that is watched; ``throughput``: output tokens per second of all models.

        ``first_name`` gives the label of a model's gauges: weight updates rename models, and each new name would
        add a time series.
        """

        def counter(name: str, about: str) -> Counter:
            return Counter(f"sglang:{name}", about, LABELS, registry=None)

        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that ended.")
        self._cached_tokens = counter("cached_tokens", "Prompt tokens that were found in the prefix cache.")
        self._requests = counter("num_requests", "Requests that ended, for any reason.")
        self._aborted = counter("num_aborted_requests", "Requests aborted by clients or by numbers that aren't finite.")
        self._failed = counter("num_failed_requests", "Requests that ended with an error, including timeouts.")
        self._latency = Histogram(
            "sglang:e2e_request_latency_seconds",
            "From arrival to the last result of a request.",
            LABELS,
            registry=None,
            buckets=WHOLE,
        )
        self._prompt = self._cached = 0
        self._transport, self._throughput, self._first_name = transport, throughput, first_name
        self._failures = failures

    def ended(self, reply: Reply) -> None:
        labels = reply.model_label, reply.task
        self._prompt += reply.prompt_tokens
        self._cached += reply.cached_tokens
        self._requests.labels(*labels).inc()
        self._prompt_tokens.labels(*labels).inc(reply.prompt_tokens)
        self._cached_tokens.labels(*labels).inc(reply.cached_tokens)
        if reply.error is not None:
            self._failed.labels(*labels).inc()
        elif (reply.finish or {}).get("type") == "abort":
            self._aborted.labels(*labels).inc()
        else:
            self._latency.labels(*labels).observe(reply.finished - reply.created)

    def collect(self) -> Iterator[Metric]:
        counters = (self._prompt_tokens, self._cached_tokens, self._requests, self._aborted, self._failed)
        for metric in (*counters, self._latency):
            yield from metric.collect()
        yield from self._gauges()
        yield CounterMetricFamily(
            "trunkline:engine_restarts", "Restarts of the engine.", value=self._transport.restarts
        )
        failures = CounterMetricFamily(
            "trunkline:plugin_failures",
            "Exceptions of plugins' request observers and collectors.",
            labels=["plugin", "method"],
        )
        for key, count in self._failures.counts.items():
            failures.add_metric(key, count)
        yield failures

    def _gauges(self) -> Iterator[Metric]:
        """The state of the engine, and the load of the models by its last heartbeat; with several, of each replica."""
        transport = self._transport
        names = transport.replicas
        own = ["replica"] if names else []
        healthy = GaugeMetricFamily(
            "trunkline:engine_healthy",
            "1 while the engine accepts requests, and its heartbeats and passes are in time.",
            labels=own,
        )
        loads: list[tuple[Load, list[str]]] = []
        for name in names or ("",):
            with on_replica(name):
                label = [name] if names else []
                healthy.add_metric(label, transport.healthy)
                loads += [(load, label) for load in transport.beat.loads]
        yield healthy

        def by_model(name: str, about: str, value: Callable[[Load], float]) -> Metric:
            family = GaugeMetricFamily(f"sglang:{name}", about, labels=["model_name", *own])
            for load, label in loads:
                family.add_metric([self._first_name(load.model), *label], value(load))
            return family

        yield by_model("num_running_reqs", "Requests that are being computed.", lambda load: load.running)
        yield by_model("num_queue_reqs", "Requests that wait in the engine.", lambda load: load.waiting)
        yield by_model(
            "num_retracted_reqs",
            "Requests of the queue that ran before.",
            lambda load: load.retracted,
        )
        yield by_model("num_used_tokens", "KV slots that requests hold.", lambda load: load.used)
        yield by_model(
            "token_usage", "Share of the KV slots that requests hold.", lambda load: load.used / max(1, load.slots)
        )
        yield GaugeMetricFamily("sglang:gen_throughput", "Output tokens per second.", value=self._throughput())
        rate = self._cached / self._prompt if self._prompt else 0.0
        yield GaugeMetricFamily("sglang:cache_hit_rate", "Cached share of all prompt tokens so far.", value=rate)


class MetricsPage:
    """The text of ``GET /metrics``: core's metrics, then those of plugins."""

    def __init__(self, core: CoreMetrics, provided: Iterable[Provided[Collector]], failures: Failures) -> None:
        """A collector that can't be read, or that has a name of an earlier one, is logged and left out."""
        self._failures = failures
        registry = CollectorRegistry(auto_describe=True)  # only detects duplicate names; collectors are rendered singly
        own: Provided[Collector] = Provided(Plugin("core", "trunkline.core"), core)
        self._shown = [one for one in (own, *provided) if _is_registered(one, registry)]

    @property
    def observers(self) -> list[Provided[RequestObserver]]:
        """The collectors that are request observers as well."""
        return [Provided(one.plugin, one.value) for one in self._shown if isinstance(one.value, RequestObserver)]

    def text(self) -> bytes:
        """The current values of all collectors; one that fails is left out."""
        parts = []
        for one in self._shown:
            try:
                parts.append(generate_latest(one.value))
            except BaseException as error:
                self._failures.add(one, "collect", error)
        return b"".join(parts)


def _is_registered(provided: Provided[Collector], registry: CollectorRegistry) -> bool:
    try:
        registry.register(provided.value)
    except BaseException as error:
        name = type(provided.value).__name__
        log.error("%s", provided.failed(f"the metrics of {name} are left out: {describe_error(error)}"))
        return False
    return True
