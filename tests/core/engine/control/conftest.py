"""Controls of an engine in the tests' own process."""

from __future__ import annotations

import gc

import pytest

from trunkline.core.engine.control import renew, updates


@pytest.fixture(autouse=True)
def release_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update frees what it replaces, without a look at all that the tests have imported.

    The engine's own function thaws what is frozen, which is the tests' modules, see tests/conftest.py.
    """
    for module in (renew, updates):
        monkeypatch.setattr(module, "release_memory", gc.collect)
