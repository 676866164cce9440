"""Every launch compiles for every GPU without a defect, and to the code that the committed tables describe."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.environments import Unavailable

from .compile_tables import MODULES, OLDEST, VERSIONS, compiled, table_of
from .gate import markdown

RESERVE = 10.0  # seconds of the budget for what isn't compilation


@pytest.mark.compile
@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.stem)
@pytest.mark.parametrize("triton", VERSIONS)
def test_launches_compile_as_committed(suite: Any, module: Path, triton: str) -> None:
    if triton not in (OLDEST, version("triton")):
        pytest.skip(f"the environment has triton {version('triton')}, not {triton}")
    # An equal share for each test that is still to come, this one included.
    order = [(each, path) for each in VERSIONS for path in MODULES]
    share = max(5.0, suite.left - RESERVE) / (len(order) - order.index((triton, module)))
    try:
        outcome = compiled(module, triton, seed=suite.seed, seconds=share)
    except Unavailable as exc:
        pytest.skip(str(exc))
    suite.notes.append(f"{module.stem}, triton {triton}: {outcome.done} of {outcome.planned} launches")
    assert [row for row in outcome.rows if row.problems] == []
    committed, lines = table_of(module).read_text().splitlines(), markdown(outcome.rows).splitlines()
    hint = "run `python -m tests.kernels.triton.compile_tables` and look at the difference"
    assert [line for line in lines if line not in committed] == [], hint
    assert outcome.rows
    if suite.seconds is None:
        assert outcome.done == outcome.planned, "without a budget, everything is compiled"
    if outcome.done == outcome.planned:
        assert sum(f"| {triton} |" in line for line in committed) == len(outcome.rows), hint
