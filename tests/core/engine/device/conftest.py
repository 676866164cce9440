"""Fixtures for tests of devices."""

from __future__ import annotations

import pytest

from trunkline.core.model import experts
from trunkline.kernels.grouped_linear import grouped_linear_reference


@pytest.fixture
def grouped_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are computed as on a GPU: without reading on the host how many tokens each of them has."""
    monkeypatch.setattr(experts, "grouped_linear", grouped_linear_reference)
