"""Fixtures for tests of devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from trunkline.kernels import backend


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode passes of torch_native can be graphs, though too slow for a wide slot table."""
    monkeypatch.setattr(backend, "TORCH_NATIVE", replace(backend.TORCH_NATIVE, captures=True))
