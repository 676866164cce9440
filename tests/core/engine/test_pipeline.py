"""Which lane computes next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from trunkline.core.engine.pipeline import Pipeline


class FakeLane:
    """Always busy; each of its passes takes the same time."""

    halted = False
    overlaps = False

    def __init__(self, name: str, seconds: float, *, decodes: bool, busy: bool = True) -> None:
        self.name, self.seconds, self.busy = name, seconds, busy
        self.device_seconds = self.finished_at = 0.0
        self.beside: list[Any] = []
        self.scheduler = SimpleNamespace(plan=self.plan, delay=1.0 if decodes else None)

    def plan(self, *, ahead: bool, beside: list[Any]) -> Any:
        self.beside = beside
        return SimpleNamespace(started=[])

    def start(self, batch: Any, previous: Any) -> Any:
        return SimpleNamespace(cancelled=False, failed=False, batch=batch)

    def finish(self, flight: Any, following: Any, *, after: float) -> list[Any]:
        self.device_seconds += self.seconds
        return []


def order(passes: int, *lanes: Any) -> str:
    started: list[str] = []
    pipeline = Pipeline(lanes, lambda requests: None, lambda lane, batch, steps: started.append(lane.name))
    for _ in range(passes):
        pipeline.advance()
    return "".join(started)


@pytest.mark.parametrize(
    ("chat", "texts", "expected"),
    [(3, 1, "ctctctctc"), (1, 1, "ctctctctc"), (1, 3, "ctccctccc")],
)
def test_a_lane_that_decodes_waits_for_one_pass_of_another(chat: float, texts: float, expected: str) -> None:
    """However short; a longer one is compensated for."""
    assert order(9, FakeLane("c", chat, decodes=True), FakeLane("t", texts, decodes=False)) == expected


def test_it_waits_for_one_pass_of_each_other_lane() -> None:
    chat, *others = FakeLane("c", 5, decodes=True), FakeLane("t", 1, decodes=False), FakeLane("u", 1, decodes=False)
    assert order(9, chat, *others) == "ctuctuctu"
    assert chat.beside == [other.scheduler for other in others]


def test_lanes_without_a_limit_share_the_time() -> None:
    lanes = FakeLane("a", 3, decodes=False), FakeLane("b", 1, decodes=False)
    assert order(8, *lanes) == "abbbabbb"


def test_lanes_that_wait_for_work_delay_none() -> None:
    chat, idle = FakeLane("c", 1, decodes=True), FakeLane("i", 1, decodes=False, busy=False)
    assert order(3, chat, idle) == "ccc"
    assert chat.beside == []
