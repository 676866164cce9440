"""Several tickets at once: all end, or none goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trunkline.core import Engine
from trunkline.plugins.generation.offline import generate


def test_who_runs_out_of_time_leaves_nothing_running(zoo: Callable[[str], Path]) -> None:
    with Engine(str(zoo("llama")), dtype="float32", threads=1) as engine:
        with pytest.raises(TimeoutError):
            generate(engine, [[5, 6, 7]] * 4, timeout=0.01, max_new_tokens=480, ignore_eos=True)
        deadline = time.monotonic() + 10
        while engine._loop.requests and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not engine._loop.requests
        (lane,) = engine._loop.lanes
        assert not lane.busy
        assert len(generate(engine, [[5, 6, 7]], max_new_tokens=2)) == 1
