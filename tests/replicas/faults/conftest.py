"""The cluster of the fault matrix, and the file with the counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.faults import runs
from tests.api.faults.install import install
from tests.api.faults.table import REPLICAS
from tests.replicas.processes import ends_all

from .cluster import Cluster


@pytest.fixture(scope="module", autouse=True)
def nothing_left() -> Iterator[None]:
    """In place of the fixture for each test: they share the cluster."""
    with ends_all():
        yield


@pytest.fixture(scope="module")
def cluster(
    nothing_left: None,
    python: Path,
    surroundings: dict[str, str],
    zoo: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    """Three replicas of a tiny Llama, with the plugin of the fault matrix."""
    packages = install(tmp_path_factory.mktemp("packages"))
    settings = {
        "model": str(zoo("llama")),
        "task": ["generation", "embedding"],
        "served_model_name": "tiny",
        "dtype": "float32",
        "threads": 1,
        "max_running_requests": 8,
        "max_total_tokens": 4096,
    }
    path = {"PYTHONPATH": f"{surroundings['PYTHONPATH']}:{packages}"}
    made = Cluster(python, tmp_path_factory.mktemp("cluster"), settings, os.environ | path)
    yield made
    made.close()


@pytest.fixture
def repetitions(suite: Any) -> int:
    """How often each fault is caused."""
    return runs.repetitions(suite)


@pytest.fixture(scope="module")
def counts(repository: Path) -> Iterator[dict[str, Any]]:
    """Counts by fault, which are written below benchmarks/results."""
    with runs.recorded(repository / "benchmarks" / "results", "replica-reliability", REPLICAS) as counts:
        yield counts
