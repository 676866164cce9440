"""The compile gate finds every defect of seeded_kernels.py: the project's kernels and launchers, each changed once."""

from __future__ import annotations

from pathlib import Path

import pytest

from .gate import Row, compile_launches

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], Row]:
    outcome = compile_launches(HERE / "seeded_kernels.py", ["sm_90", "gfx942"])
    assert outcome.done == outcome.planned == 8
    return {(row.launch, row.target): row for row in outcome.rows}


@pytest.mark.parametrize(
    ("launch", "target", "problem"),
    [
        ("a plan too large", "sm_90", " spills"),
        ("a plan too large", "gfx942", " bytes of shared memory, more than 65536"),
        ("too few warps", "sm_90", " spills"),
        ("deep pipeline", "sm_90", " bytes of shared memory, more than 232448"),
        ("a specialised argument", "sm_90", "3 variants instead of 1"),
        ("a stride as an argument", "sm_90", "no load of 128 bits"),
        ("tiles too small for wgmma", "sm_90", "no instruction HGMMA"),
        ("no tensor cores", "sm_90", "no instruction "),
    ],
)
def test_a_defect_of_a_kernel_is_found(
    rows: dict[tuple[str, str], Row], launch: str, target: str, problem: str
) -> None:
    assert any(problem in found for found in rows[launch, target].problems), rows[launch, target]
