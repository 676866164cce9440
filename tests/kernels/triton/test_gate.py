"""The compile gate passes good launches and finds every defect of seeded_launches.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from .gate import Expected, Row, compile_launches, markdown
from .gate.code import Figures
from .gate.compiling import worst
from .gate.rows import problems

HERE = Path(__file__).parent
GOOD = {"attention, D=64", "attention, D=72", "norm", "scatter"}
Problems = Callable[[str, str], dict[str, tuple[str, ...]]]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    outcome = compile_launches(HERE / "seeded_launches.py", ["sm_90", "gfx942"])
    assert outcome.done == outcome.planned == 15
    return outcome.rows


@pytest.fixture(scope="module")
def found(rows: list[Row]) -> Problems:
    """By launch and target: kernel -> problems."""
    return lambda launch, target: {
        row.kernel: row.problems for row in rows if (row.launch, row.target) == (launch, target)
    }


def test_good_launches_pass(rows: list[Row]) -> None:
    good = [row for row in rows if row.launch in GOOD]
    assert len(good) == 5
    assert [row for row in good if row.problems] == []
    cores = {row.target: set(row.tensor_cores) for row in good if row.kernel == "_gather_attention"}
    assert cores == {"sm_90": {"HMMA"}, "gfx942": {"MFMA"}}


def test_spills_and_shared_memory_are_found(found: Problems) -> None:
    [wrong] = found("registers", "sm_90").values()
    assert any(problem.endswith(" spills") for problem in wrong)
    [wrong] = found("registers", "gfx942").values()
    assert any("bytes of shared memory, more than 65536" in problem for problem in wrong)


@pytest.mark.parametrize(
    ("launch", "target", "expected"),
    [
        ("alignment", "sm_90", {"_row_norm": ("no load of 128 bits",)}),
        ("tensor cores", "sm_90", {"_row_norm": ("no instruction HGMMA|MFMA",)}),
        ("tensor cores", "gfx942", {"_row_norm": ("no instruction HGMMA|MFMA",)}),
        ("variants", "sm_90", {"_specialised": ("3 variants instead of 1",)}),
        ("unnamed", "sm_90", {"_row_norm": ("a kernel that the launch doesn't name",)}),
        ("absent", "sm_90", {"_row_norm": (), "_combine": ("not launched",)}),
    ],
)
def test_a_defect_is_found(found: Problems, launch: str, target: str, expected: dict[str, tuple[str, ...]]) -> None:
    assert found(launch, target) == expected


def test_registers_are_limited(found: Problems) -> None:
    [[problem]] = found("occupancy", "sm_90").values()
    assert problem.endswith(" registers, more than 16")


def test_a_launch_that_does_not_compile_has_its_error(found: Problems) -> None:
    [[error]] = found("error", "sm_90").values()
    assert "blocks are larger than 64" in error


def test_a_row_as_it_must_be_has_no_problems() -> None:
    row = Row("a", "k", "sm_80", "3.9.0", variants=1, registers=255, shared=99 << 10, loads=2, wide_loads=1)
    assert problems(row, Expected()) == ()
    assert problems(Row("a", "k", "gfx942", "3.9.0", variants=1, shared=65537, wide_loads=1), Expected()) == (
        "65537 bytes of shared memory, more than 65536",
    )


def test_the_table_has_every_figure() -> None:
    cores = {"HMMA": 8, "HGMMA": 4}
    row = Row("a", "k", "sm_90", "3.9.0", 1, 4, 72, 0, 20992, 24, 17, cores, ("bad", "worse"))
    line = "| a | k | sm_90 | 3.9.0 | 1 | 4 | 72 | 0 | 20.5 | 24, 17 | 4 HGMMA, 8 HMMA | bad; worse |"
    assert markdown([row]).splitlines()[2:] == [line]
    assert Row.from_json(row.as_json()) == row


def test_a_row_has_the_worst_of_its_variants() -> None:
    one = Figures(4, 100, 60, 0, 9, 8, Counter(HMMA=4, HGMMA=2))
    two = Figures(8, 90, 70, 3, 7, 0, Counter(HMMA=2))
    wanted = {"warps": 8, "shared": 100, "registers": 70, "spills": 3, "loads": 7, "wide_loads": 0}
    assert worst([one, two]) == worst([two, one]) == {**wanted, "tensor_cores": {"HMMA": 2}}


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    module = tmp_path / "broken.py"
    module.write_text("raise ValueError('no launches here')\n")
    with pytest.raises(RuntimeError, match="no launches here"):
        compile_launches(module, ["sm_90"])
