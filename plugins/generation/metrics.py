"""Prometheus metrics of output tokens, under SGLang's names, so that its dashboards work.

Their panels sum over all labels. Therefore only requests with output tokens are counted: the time until a vector or a
score would otherwise appear as a time to the first token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from trunkline.core.types import Reply, RequestObserver

LABELS = ("model_name", "task")
# Seconds: from a short prompt on an idle GPU to a long prompt at the end of a queue.
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100, 200)
INTER_TOKEN_BUCKETS = (0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.2, 0.4, 1, 2, 5)


class TokenMetrics(Collector, RequestObserver):
    """Number of output tokens, time to the first one and time between two, by model and task."""

    def __init__(self) -> None:
        self._tokens = Counter(
            "sglang:generation_tokens", "Output tokens of requests that ended.", LABELS, registry=None
        )
        self._first = _histogram(
            "time_to_first_token", "Until the first output token of a request.", FIRST_TOKEN_BUCKETS
        )
        self._between = _histogram(
            "inter_token_latency", "Between two output tokens of a request.", INTER_TOKEN_BUCKETS
        )

    def progressed(self, reply: Reply, tokens: int) -> None:
        if not tokens:
            return
        now, labels = time.perf_counter(), (reply.model_label, reply.task)
        if not reply.tokens:
            self._first.labels(*labels).observe(now - reply.created)
            return
        seconds, between = (now - reply.latest) / tokens, self._between.labels(*labels)
        for _ in range(tokens):
            between.observe(seconds)

    def ended(self, reply: Reply) -> None:
        if reply.tokens:
            self._tokens.labels(reply.model_label, reply.task).inc(len(reply.tokens))

    def collect(self) -> Iterator[Metric]:
        for metric in (self._tokens, self._first, self._between):
            yield from metric.collect()


def _histogram(name: str, description: str, buckets: Sequence[float]) -> Histogram:
    return Histogram(f"sglang:{name}_seconds", description, LABELS, registry=None, buckets=buckets)
