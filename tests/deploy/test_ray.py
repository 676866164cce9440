"""deploy/kubernetes/ray/: its pods are valid, and its application is one that the server understands."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

from trunkline.core.cluster.arguments import read_arguments
from trunkline.core.host import Host


@pytest.fixture(scope="module")
def cluster(service: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = service["spec"]["rayClusterConfig"]
    return found


@pytest.fixture(scope="module")
def service(deploy: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((deploy / "kubernetes" / "ray" / "rayservice.yaml").read_text())
    return content


@pytest.fixture(scope="module")
def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_pods_are_valid_and_not_root(pods: list[dict[str, Any]]) -> None:
    for spec in pods:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        assert spec["securityContext"]["runAsNonRoot"]
        assert {container["image"] for container in spec["containers"]} == {"trunkline:ray"}


def test_the_version_is_one_that_the_package_allows(cluster: dict[str, Any], repository: Path) -> None:
    extras = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [wanted] = [Requirement(text) for text in extras["ray"]]
    assert wanted.specifier.contains(cluster["rayVersion"])


def test_the_application_has_arguments_that_the_server_knows(
    service: dict[str, Any], pods: list[dict[str, Any]], tmp_path: Path
) -> None:
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "trunkline.core.cluster:build"
    keys = Path(application["args"]["config"])
    assert {str(keys.parent)} <= {mount["mountPath"] for pod in pods for mount in pod["containers"][0]["volumeMounts"]}
    (tmp_path / keys.name).write_text('[server]\napi_key = "a"\n')
    arguments, config = read_arguments(application["args"] | {"config": str(tmp_path / keys.name)}, Host.load())
    assert (config.server.api_key, config.server.enable_metrics) == ("a", True)
    assert arguments.resources["num_cpus"] == config.engine.threads
    # A worker has room for one replica, and there is a worker for each.
    workers = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert workers["replicas"] == sum(model.replicas or 1 for model in config.models)
    cpus = workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    assert int(cpus) == arguments.resources["num_cpus"]
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > config.server.drain_timeout
