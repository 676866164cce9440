"""In the deterministic mode, a request has the same tokens and bits alone and in any schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from .schedules import MODELS, TASK_OF, Schedule, engines, run, schedules

Run = Callable[[Schedule], None]


def prepared(zoo: Callable[[str], Path], models: Sequence[str], dtype: str) -> Iterator[Run]:
    with engines([zoo(name) for name in models], dtype) as (alone, together):
        yield lambda schedule: run(alone, together, models, schedule)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run_schedule(request: Any, zoo: Callable[[str], Path]) -> Iterator[Run]:
    yield from prepared(zoo, MODELS, request.param)


@pytest.fixture(scope="module")
def run_all_kinds(zoo: Callable[[str], Path]) -> Iterator[Run]:
    yield from prepared(zoo, list(TASK_OF), "float32")


@given(schedules(MODELS))
@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_schedules(run_schedule: Run, schedule: Schedule) -> None:
    run_schedule(schedule)


@pytest.mark.faults
@given(schedules(list(TASK_OF)))
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
def test_more_schedules_and_models(run_all_kinds: Run, schedule: Schedule) -> None:
    run_all_kinds(schedule)
