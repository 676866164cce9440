"""deploy/compose.yaml: its schema, and what it assumes of the server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trunkline.core.client.supervisor import STOP_SECONDS
from trunkline.core.config import Config
from trunkline.core.server.http_protocol import SHUTDOWN_SECONDS


@pytest.fixture(scope="module")
def server(compose: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = compose["services"]["server"]
    return found


def test_it_is_valid(deploy: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(deploy / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_files_that_it_mounts_exist(compose: dict[str, Any], deploy: Path) -> None:
    mounts = [mount for service in compose["services"].values() for mount in service.get("volumes", [])]
    paths = [mount.split(":")[0] for mount in mounts if mount.startswith(".")]
    assert len(paths) >= 5
    assert [path for path in paths if not (deploy / path).is_file()] == []


def test_the_server_may_finish_its_requests(
    server: dict[str, Any], started_with: Callable[[list[str]], Config]
) -> None:
    config = started_with(server["command"]).server
    grace = float(server["stop_grace_period"].removesuffix("s"))
    assert grace >= config.drain_timeout + STOP_SECONDS + SHUTDOWN_SECONDS


def test_the_server_has_keys_and_metrics(server: dict[str, Any], started_with: Callable[[list[str]], Config]) -> None:
    config = started_with(server["command"]).server
    assert (config.api_key, config.admin_api_key) == ("a", "b")
    assert config.enable_metrics
    (secret,) = server["secrets"]
    assert f"--config=/run/secrets/{secret['target']}" in server["command"]


def test_ports_are_open_on_this_machine_only(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_prometheus_scrapes_the_server(
    compose: dict[str, Any], deploy: Path, started_with: Callable[[list[str]], Config]
) -> None:
    port = started_with(compose["services"]["server"]["command"]).server.port
    (job,) = yaml.safe_load((deploy / "monitoring" / "prometheus.yaml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{port}"]}]
    assert compose["services"]["server"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert 'job="trunkline"' in (deploy / "monitoring" / "alerts.yaml").read_text()
    assert job["job_name"] == "trunkline"
