"""Benchmarks are scripts beside each other; some import triton."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _beside_each_other(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import one another by name."""
    monkeypatch.syspath_prepend(repository / "benchmarks")  # type: ignore[no-untyped-call]


def pytest_unconfigure() -> None:
    """Undo the freeze of the root conftest: triton's extension module lists every object that outlives it."""
    gc.unfreeze()
    gc.collect()
