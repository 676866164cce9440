"""Benchmarks are scripts beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _beside_each_other(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import one another by name."""
    monkeypatch.syspath_prepend(repository / "benchmarks")  # type: ignore[no-untyped-call]
