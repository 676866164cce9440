"""deploy/kubernetes/: its schemas, and what the manifests assume of the server and the image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from litestar import Litestar
from litestar.testing import TestClient

from trunkline.core.client.supervisor import STOP_SECONDS, WatchdogLimits
from trunkline.core.config import Config
from trunkline.core.server.http_protocol import SHUTDOWN_SECONDS
from trunkline.core.server.lifecycle import Lifecycle
from trunkline.core.server.routes.health import health_routes

FIRST = "1.30"  # the first version with preStop.sleep in all clusters


@pytest.mark.parametrize("version", [FIRST, kubernetes_validate.latest_version()])
def test_manifests_are_valid(manifests: dict[str, Any], version: str) -> None:
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_every_file_is_a_resource(deploy: Path) -> None:
    base = deploy / "kubernetes" / "base"
    listed = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    assert {path.name for path in base.iterdir()} == {"kustomization.yaml", *listed}


def test_the_gpu_has_an_image_and_a_limit_of_its_own(deploy: Path) -> None:
    overlay = yaml.safe_load((deploy / "kubernetes" / "gpu" / "kustomization.yaml").read_text())
    assert overlay["images"] == [{"name": "trunkline", "newTag": "gpu"}]
    assert "resources/limits/nvidia.com~1gpu" in overlay["patches"][0]["patch"]


def test_the_server_may_finish_its_requests(
    pod: dict[str, Any], container: dict[str, Any], started_with: Callable[[list[str]], Config]
) -> None:
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = started_with(container["args"]).server.drain_timeout
    assert pod["terminationGracePeriodSeconds"] >= sleep + drain + STOP_SECONDS + SHUTDOWN_SECONDS
    readiness = container["readinessProbe"]
    assert sleep >= readiness["periodSeconds"], "time to learn that the pod isn't ready"


def test_the_server_has_keys_and_metrics(
    manifests: dict[str, Any], container: dict[str, Any], started_with: Callable[[list[str]], Config]
) -> None:
    config = started_with(container["args"]).server
    assert (config.api_key, config.admin_api_key) == ("a", "b")
    annotations = manifests["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert config.enable_metrics
    assert annotations["prometheus.io/port"] == str(config.port)
    assert container["ports"] == [{"name": "http", "containerPort": config.port}]


def status(probe: dict[str, Any], **lifecycle: Any) -> int:
    """What a probe gets from a server in this state."""
    engine: Any = None  # for /health_generate only
    with TestClient(Litestar(list(health_routes(engine, Lifecycle(**lifecycle))), openapi_config=None)) as client:
        return client.get(probe["httpGet"]["path"]).status_code


def test_only_a_server_that_answers_nothing_is_killed(container: dict[str, Any]) -> None:
    alive, ready = container["livenessProbe"], container["readinessProbe"]
    for state in ({"healthy": lambda: False}, {"draining": True}):
        assert status(alive, **state) == 200
        assert status(ready, **state) == 503
    assert status(ready) == 200


def test_the_server_s_own_limit_on_its_start_comes_first(manifests: dict[str, Any], container: dict[str, Any]) -> None:
    """Its error says what was slow."""
    probe = container["startupProbe"]
    assert status(probe, warm=False) == 503
    allowed = probe["periodSeconds"] * probe["failureThreshold"]
    assert WatchdogLimits().starting < allowed < manifests["Deployment"]["spec"]["progressDeadlineSeconds"]


def test_pods_run_as_the_image_s_user(pod: dict[str, Any], dockerfile: list[tuple[str, str]]) -> None:
    user = [text for instruction, text in dockerfile if instruction == "USER"][-1]
    security = pod["securityContext"]
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"
    assert security["fsGroup"] == security["runAsGroup"]


def test_folders_that_the_server_writes_to_are_volumes(
    manifests: dict[str, Any], pod: dict[str, Any], container: dict[str, Any]
) -> None:
    assert container["securityContext"]["readOnlyRootFilesystem"]
    kinds = {volume["name"]: volume for volume in pod["volumes"]}
    mounted = {mount["mountPath"]: kinds[mount["name"]] for mount in container["volumeMounts"]}
    claim = manifests["PersistentVolumeClaim"]["metadata"]["name"]
    assert mounted["/data"]["persistentVolumeClaim"] == {"claimName": claim}
    assert "emptyDir" in mounted["/tmp"]
    assert "secret" in mounted[str(Path(container["args"][0].removeprefix("--config=")).parent)]


def test_everything_selects_the_pods(manifests: dict[str, Any]) -> None:
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifests["Service"]["spec"]["selector"] == labels
    assert manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert manifests[kind]["spec"]["selector"]["matchLabels"] == labels
