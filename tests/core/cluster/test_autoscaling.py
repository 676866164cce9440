"""The number of replicas for a number of tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from trunkline.core.cluster.autoscaling import TOKENS, RequestTokens


@pytest.mark.parametrize(
    ("tokens", "replicas"),
    [({"a": 0.0, "b": 0.0}, 0), ({"a": 1.0, "b": 0.0}, 1), ({"a": 100.0}, 1), ({"a": 60.0, "b": 41.0}, 2)],
)
def test_as_many_as_the_tokens_need(tokens: dict[str, float], replicas: int) -> None:
    context = SimpleNamespace(aggregated_metrics={TOKENS: tokens}, target_num_replicas=7)
    assert RequestTokens(100)(context) == (replicas, {})


@pytest.mark.parametrize("metrics", [None, {}, {TOKENS: {}}])
def test_no_report_changes_nothing(metrics: object) -> None:
    assert RequestTokens()(SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=7)) == (7, {})


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        RequestTokens(0)
