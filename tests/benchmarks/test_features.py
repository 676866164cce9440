"""The benchmark of sampling features runs on a tiny model, so that it can't rot unseen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from trunkline.core import Engine


@pytest.fixture
def features(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/features.py")


def test_every_variant_is_measured(features: ModuleType, zoo: Callable[[str], Path]) -> None:
    with Engine(str(zoo("llama")), dtype="float32", threads=1) as engine:
        found = features.measure(engine, rows=3, steps=10, rounds=2)
    assert found.keys() == features.VARIANTS.keys()
    assert all(len(times) == 2 and min(times) > 0 for times in found.values())
    assert len(features.table(found).splitlines()) == len(found) + 2


def test_the_share_is_of_the_whole_step(features: ModuleType) -> None:
    plain, costly = list(features.VARIANTS)[:2]
    rows = features.table({plain: [0.09, 0.09, 0.2, 0.3], costly: [0.1, 0.1, 0.5, 0.1]}).splitlines()[2:]
    assert [row.split(" | ")[1:] for row in rows] == [["90.0", "0.0% |"], ["100.0", "10.0% |"]]
