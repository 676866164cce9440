"""Arguments of ``serve run trunkline.core.cluster:build`` and of Ray's YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trunkline.core.cluster.arguments import Arguments, read_arguments
from trunkline.core.config import DEFAULT_MODEL
from trunkline.core.errors import ConfigError
from trunkline.core.host import Host


@pytest.fixture(scope="module")
def plugins() -> Host:
    return Host.load()


def test_text_as_serve_run_passes_it(plugins: Host) -> None:
    arguments, config = read_arguments(
        {"model": "7", "replicas": "2", "dtype": "float32", "enable_metrics": "true", "threads": "3"}, plugins
    )
    assert arguments == Arguments(model="7")
    [model] = config.models
    assert (model.model_path, model.replicas, model.dtype) == ("7", 2, "float32")
    assert (config.server.enable_metrics, config.engine.threads) == (True, 3)


def test_tables_of_models(plugins: Host) -> None:
    models = [{"model_path": "a", "replicas": 3, "task": ["embedding"]}, {"model_path": "b"}]
    args = {"models": models, "ingress_replicas": 2, "resources": {"num_cpus": 4}, "dtype": "float32"}
    arguments, config = read_arguments(args, plugins)
    assert (arguments.ingress_replicas, arguments.resources) == (2, {"num_cpus": 4})
    assert [(model.name, model.replicas, model.dtype) for model in config.models] == [
        ("a", 3, "float32"),
        ("b", None, "float32"),
    ]


def test_a_file_and_what_overrides_it(plugins: Host, tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('[server]\napi_key = "secret"\nport = 1234\n[[models]]\nmodel_path = "a"\nreplicas = 4\n')
    _, config = read_arguments({"config": str(file), "port": "4321"}, plugins)
    assert (config.server.api_key, config.server.port) == ("secret", 4321)
    assert [(model.name, model.replicas) for model in config.models] == [("a", 4)]


def test_the_demo_model_by_default(plugins: Host) -> None:
    _, config = read_arguments({}, plugins)
    assert [(model.name, model.replicas) for model in config.models] == [(DEFAULT_MODEL, None)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"replicsa": "2"}, "Unknown setting 'replicsa'"),
        ({"replicas": "0"}, ">= 1"),
        ({"replicas": "two"}, "replicas"),
        ({"ingress_replicas": "two"}, "ingress_replicas"),
        ({"models": "a"}, "models"),
        ({"config": "/nowhere.toml"}, "Can't read"),
    ],
)
def test_what_is_wrong_is_said(plugins: Host, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_arguments(args, plugins)
