"""Controls of an engine in the tests' own process."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from trunkline.core.engine.control import update_loader, updates


def freeze() -> None:
    """Exempt what there is from garbage collection, except what is garbage."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def imports() -> None:
    """What tests before these have imported since tests/conftest.py exempted what there was then."""
    freeze()


@pytest.fixture(autouse=True)
def collect_garbage(imports: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update frees what it replaces, without a look at all that the tests have imported.

    The engine's own function looks at what is exempt, too.
    """
    for module in (update_loader, updates):
        monkeypatch.setattr(module, "collect_garbage", gc.collect)


@pytest.fixture
def frozen() -> Iterator[None]:
    """For tests that exempt their own engine: it comes first in their arguments, so that the engine has ended."""
    yield
    freeze()
