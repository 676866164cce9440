"""The dashboard and the alert rules use metrics and labels that /metrics has, in expressions that Prometheus reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from trunkline.core.client.contracts import CheckedObservers, Failures
from trunkline.core.client.metrics import CoreMetrics, MetricsPage
from trunkline.core.client.replies import EngineReply
from trunkline.core.commands.serve import all_flags
from trunkline.core.config import Config
from trunkline.core.discovery import Plugin, Provided
from trunkline.core.engine.messages import Heartbeat, Load, Progress, Started
from trunkline.core.host import Host

OF_PROMETHEUS = {"instance", "job"}  # labels that it adds to every sample


@dataclass
class Reading:
    """The metrics of an expression, and the labels of its result."""

    metrics: list[tuple[str, set[str]]] = field(default_factory=list)  # name, labels in its matchers
    by: list[list[str]] = field(default_factory=list)  # of aggregations


def read(expression: str) -> Reading:
    """ValueError if it isn't PromQL. Grafana's variables for durations are replaced by one."""
    found = Reading()

    def visit(node: promql_parser.Expr) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.metrics.append((node.name, {matcher.name for matcher in node.matchers.matchers}))
        elif isinstance(node, promql_parser.AggregateExpr):
            found.by.append(node.modifier.labels if node.modifier else [])
        return True

    promql_parser.walk(promql_parser.parse(re.sub(r"\[\$__\w+\]", "[5m]", expression)), pre_visit=visit)
    return found


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Metric -> labels, as /metrics shows them after requests that were completed, failed and aborted."""
    host, failures = Host.load(), Failures()
    transport: Any = SimpleNamespace(
        beat=Heartbeat(0.0, [Load("m", 0, 0, 0, 1, 1)]), healthy=True, restarts=0, replicas=()
    )
    core = CoreMetrics(transport, lambda: 0.0, str, failures)
    page = MetricsPage(core, host.metrics(Config.load({}, host).settings), failures)
    observers = CheckedObservers(page.observers, failures)
    stop, abort = {"type": "stop"}, {"type": "abort"}
    for last in (Progress(1, [3], finish=stop), Progress(1, [], finish=abort), Progress(1, [], error=(500, "", None))):
        reply = EngineReply(1, "m", "generation", "r", 3, lambda reply: None, observers=observers)
        reply.start(Started(1, 0), "")
        reply.apply(Progress(1, [1]))
        reply.apply(last)
    failures.add(Provided(Plugin("p", "package"), object()), "ended", ValueError("for the counter"))
    found: dict[str, set[str]] = {"up": set()}  # Prometheus's own
    for family in text_string_to_metric_families(page.text().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture(scope="module")
def rules(deploy: Path) -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((deploy / "monitoring" / "alerts.yaml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


@pytest.fixture(scope="module")
def dashboard(deploy: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((deploy / "monitoring" / "dashboard.json").read_text())
    return found


@pytest.fixture(scope="module")
def queries(rules: list[dict[str, Any]], dashboard: dict[str, Any]) -> list[tuple[str, str]]:
    """(expression, text that refers to labels of its result) of rules, panels and variables."""
    found = [(rule["expr"], " ".join(rule["annotations"].values())) for rule in rules]
    for panel in dashboard["panels"]:
        found += [(target["expr"], target["legendFormat"]) for target in panel["targets"]]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
            found.append((selector, f"{{{{{label}}}}}"))
    return found


def unknown(queries: list[tuple[str, str]], exported: dict[str, set[str]]) -> Iterator[str]:
    """Metrics that aren't exported, and labels that they or the results don't have."""
    for expression, text in queries:
        reading = read(expression)
        missing = [name for name, _ in reading.metrics if name not in exported]
        if missing:
            yield f"{expression}: {missing}"
            continue
        own = {label for name, _ in reading.metrics for label in exported[name]} | OF_PROMETHEUS
        matched = {label for _, labels in reading.metrics for label in labels}
        grouped = {label for labels in reading.by for label in labels}
        shown = set(re.findall(r"\{\{ ?(?:\$labels\.)?(\w+) ?\}\}", text))
        left = grouped if reading.by else own
        wrong = (matched - own) | (grouped - own) | (shown - left)
        if wrong:
            yield f"{expression}: {sorted(wrong)}"


def test_metrics_and_labels_exist(queries: list[tuple[str, str]], exported: dict[str, set[str]]) -> None:
    assert len(queries) > 30
    assert list(unknown(queries, exported)) == []


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("sglang:no_such_metric", ""),
        ("sglang:num_queue_reqs{task='x'}", ""),
        ("sum by (task) (sglang:num_queue_reqs)", ""),
        ("sum by (model_name) (sglang:num_requests_total)", "{{ $labels.task }}"),
        ("sum(sglang:num_requests_total)", "{{model_name}}"),
    ],
)
def test_what_does_not_exist_is_found(expression: str, text: str, exported: dict[str, set[str]]) -> None:
    assert len(list(unknown([(expression, text)], exported))) == 1
    with pytest.raises(ValueError, match=r"\w"):
        read(f"{expression} >")


def test_every_metric_of_ours_is_on_the_dashboard(dashboard: dict[str, Any], exported: dict[str, set[str]]) -> None:
    expressions = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    bases = {re.sub(r"_(created|count|sum|bucket)$", "", name) for name in exported} - {"up"}
    families = {name for name in bases if f"{name}_total" not in bases}
    assert sorted(name for name in families if name not in expressions) == []


def test_each_alert_says_what_to_do(rules: list[dict[str, Any]], repository: Path) -> None:
    page = (repository / "docs" / "deployment.md").read_text()
    listed = re.findall(r"^\| (Trunkline\w+) \| (\w+) \|", page, re.MULTILINE)
    assert listed == [(rule["alert"], rule["labels"]["severity"]) for rule in rules]
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}


@pytest.mark.parametrize(
    "file", ["monitoring/alerts.yaml", "monitoring/dashboard.json", "kubernetes/base/deployment.yaml"]
)
def test_flags_that_are_named_exist(deploy: Path, file: str) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (deploy / file).read_text()))
    flags = {name for flag in all_flags(Host.load()) for name in flag.names}
    assert named
    assert named - flags - {"--config"} == set()


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
