"""Numbers for Prometheus under SGLang's names, from what the front sees of requests.

Names and labels are those of SGLang's collector, so that its dashboards work; ``task`` is ours.
Histograms and counters change when something happens to a request; gauges are read when asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from trunkline.core.engine.messages import Load

    from .replies import EngineReply

LABELS = ("model_name", "task")
# Seconds: from a short prompt on an idle GPU to a long one at the end of a queue.
FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100, 200)
BETWEEN = (0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.2, 0.4, 1, 2, 5)
WHOLE = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100, 200, 400, 800)


class Metrics(Collector):
    """What happened to requests since the start, by model and task. Lives on the event loop."""

    def __init__(
        self,
        loads: Callable[[], Iterable[Load]],
        throughput: Callable[[], float],
        first_name: Callable[[str], str] = lambda name: name,
    ) -> None:
        """``loads``: what each model holds now; ``throughput``: output tokens a second, of all models.

        ``first_name`` of a model labels its numbers: weight updates rename it, and series would grow without end.
        """
        registry = self._registry = CollectorRegistry()

        def counter(name: str, about: str) -> Counter:
            return Counter(f"sglang:{name}", about, LABELS, registry=registry)

        def histogram(name: str, about: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"sglang:{name}_seconds", about, LABELS, registry=registry, buckets=buckets)

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that ended.")
        self.cached_tokens = counter("cached_tokens", "Prompt tokens that the cache held already.")
        self.generation_tokens = counter("generation_tokens", "Output tokens of requests that ended.")
        self.requests = counter("num_requests", "Requests that ended, however they did.")
        self.aborted = counter("num_aborted_requests", "Requests that clients ended, or numbers that weren't finite.")
        self.failed = counter("num_failed_requests", "Requests that ended with an error, timeouts among them.")
        self.first = histogram("time_to_first_token", "Until the first result of a request.", FIRST)
        self.between = histogram("inter_token_latency", "Between two output tokens of a request.", BETWEEN)
        self.whole = histogram("e2e_request_latency", "From arrival to the last result of a request.", WHOLE)
        self._prompt = self._cached = 0
        self._loads, self._throughput, self._first_name = loads, throughput, first_name
        registry.register(self)

    def progressed(self, reply: EngineReply, tokens: int) -> None:
        """A result has come, with so many output tokens; ``reply`` doesn't know it yet."""
        now, labels = time.perf_counter(), (self._first_name(reply.model), reply.task)
        if not reply.first:
            self.first.labels(*labels).observe(now - reply.created)
        elif tokens:
            each, histogram = (now - reply.latest) / tokens, self.between.labels(*labels)
            for _ in range(tokens):
                histogram.observe(each)

    def ended(self, reply: EngineReply) -> None:
        """``reply`` is over, whoever ended it."""
        labels = self._first_name(reply.model), reply.task
        self._prompt += reply.prompt_tokens
        self._cached += reply.cached_tokens
        self.requests.labels(*labels).inc()
        self.prompt_tokens.labels(*labels).inc(reply.prompt_tokens)
        self.cached_tokens.labels(*labels).inc(reply.cached_tokens)
        self.generation_tokens.labels(*labels).inc(len(reply.tokens))
        if reply.error is not None:
            self.failed.labels(*labels).inc()
        elif (reply.finish or {}).get("type") == "abort":
            self.aborted.labels(*labels).inc()
        else:
            self.whole.labels(*labels).observe(reply.finished - reply.created)

    def collect(self) -> Iterator[Metric]:
        """The gauges: what is true now."""
        loads = list(self._loads())

        def by_model(name: str, about: str, value: Callable[[Load], float]) -> Metric:
            family = GaugeMetricFamily(f"sglang:{name}", about, labels=["model_name"])
            for load in loads:
                family.add_metric([self._first_name(load.model)], value(load))
            return family

        yield by_model("num_running_reqs", "Requests that are being computed.", lambda load: load.running)
        yield by_model("num_queue_reqs", "Requests that wait in the engine.", lambda load: load.waiting)
        yield by_model("num_used_tokens", "Slots that requests hold.", lambda load: load.used)
        yield by_model(
            "token_usage", "Share of the slots that requests hold.", lambda load: load.used / max(1, load.slots)
        )
        yield GaugeMetricFamily("sglang:gen_throughput", "Output tokens a second.", value=self._throughput())
        rate = self._cached / self._prompt if self._prompt else 0.0
        yield GaugeMetricFamily("sglang:cache_hit_rate", "Cached share of all prompt tokens so far.", value=rate)

    def text(self) -> bytes:
        return generate_latest(self._registry)
