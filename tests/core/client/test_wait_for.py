"""Several tickets at once: all end, or none goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trunkline.core import Engine
from trunkline.plugins.generation.schemas import GenerationParams


def test_who_runs_out_of_time_leaves_nothing_running(zoo: Callable[[str], Path]) -> None:
    params = GenerationParams(max_new_tokens=480, temperature=0, ignore_eos=True)
    with Engine(str(zoo("llama")), dtype="float32", threads=1) as engine:
        tickets = [engine.submit("generation", [5, 6, 7], params) for _ in range(4)]
        with pytest.raises(TimeoutError):
            engine.wait_for(tickets, timeout=0.01)
        assert {(ticket.result(60).finish or {})["type"] for ticket in tickets} == {"abort"}
        more = [engine.submit("generation", [5, 6, 7], GenerationParams(max_new_tokens=2)) for _ in range(2)]
        engine.wait_for(more)
        assert all(ticket.done for ticket in more)
