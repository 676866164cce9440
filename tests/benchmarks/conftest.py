"""Some benchmarks import triton."""

from __future__ import annotations

import gc


def pytest_unconfigure() -> None:
    """Undo the freeze of the root conftest: triton's extension module lists every object that outlives it."""
    gc.unfreeze()
    gc.collect()
