"""The page of predicted times is up to date, follows from the compiled kernels, and reaches the goals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

from trunkline.kernels.triton import cost, plans

from .attention_cases import Case


@pytest.fixture(scope="module")
def page(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("docs/generate_gpu.py")


def test_the_page_is_up_to_date(page: ModuleType, repository: Path) -> None:
    assert (repository / "docs" / "gpu-predictions.md").read_text() == page.predictions(), "run python docs/generate.py"


def test_plans_have_the_number_of_resident_programs_as_compiled(page: ModuleType) -> None:
    """By architecture, head dim and dtype: the smallest number over all launches with the plan."""
    found: dict[tuple[str, str, int, int], list[int]] = defaultdict(list)
    for row in page.compiled():
        table = plans.DECODE if row.kernel == "split_kernel" else plans.EXTEND
        width = next(width for width in table[row.target, row.itemsize] if row.width <= width)
        found[row.kernel, row.target, row.itemsize, width].append(row.resident)
    every = {
        (kernel, *key, width): plan.resident
        for kernel, table in (("split_kernel", plans.DECODE), ("extend_kernel", plans.EXTEND))
        for key, by_width in table.items()
        for width, plan in by_width.items()
    }
    assert {key: min(counts) for key, counts in found.items()} == every


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "expected"),
    [
        ("sm_80", 4, 32, 0, 16),  # warps
        ("sm_90", 1, 16, 0, 32),  # programs
        ("sm_90", 4, 108, 39424, 4),  # registers
        ("sm_90", 8, 108, 39424, 2),  # 18 warps, of which two programs need 16
        ("sm_90", 4, 122, 75776, 3),  # shared memory
        ("sm_80", 4, 122, 75776, 2),
        ("gfx942", 4, 128, 0, 4),  # registers: 4 wavefronts per SIMD
        ("gfx942", 4, 129, 0, 3),
        ("gfx942", 4, 40, 33000, 1),  # shared memory
    ],
)
def test_resident_programs(
    page: ModuleType, target: str, warps: int, registers: int, shared: int, expected: int
) -> None:
    row = page.Compiled("decode, D=128, group 4", "split_kernel", target, warps, registers, shared)
    assert row.resident == expected


def test_predicted_shares_of_the_floor(page: ModuleType) -> None:
    """The goals on an H100, with splits for the actual lengths and with those of a graph for the whole context."""
    for bound in (0, page.CONTEXT):
        assert page.Decode("sm_90", 64, 4096, bound).share >= 0.9
        assert page.Decode("sm_90", 8, 32768, bound).share >= 0.85


def test_no_prediction_is_below_the_floor(page: ModuleType) -> None:
    decode = [page.Decode(target, rows, keys) for target in page.NAMES for rows in page.ROWS for keys in page.KEYS]
    extend = [page.Extend(target, tokens) for target in page.NAMES for tokens in page.TOKENS]
    assert [one for one in (*decode, *extend) if not 0 < one.share < 1] == []


def test_splits_of_a_graph_are_good_for_shorter_and_unequal_rows() -> None:
    """Captured for 131,072 keys: at most a quarter slower than with the best number of splits for these lengths."""
    plan, gpu = plans.decode("sm_90", 128, 2), cost.GPUS["sm_90"]
    for rows in (8, 64, 256):
        captured = cost.splits("sm_90", plan, cost.DecodeWork(rows, 131072, rows * 131072, 32, 8, 512, 128), True)
        for longest, others in ((1024, 1024), (4096, 4096), (32768, 32768), (32768, 1024), (131072, 1024)):
            work = cost.DecodeWork(rows, longest, longest + (rows - 1) * others, 32, 8, 512, 128)
            best = min(cost.decode_seconds(gpu, plan, work, count) for count in range(1, 65))
            assert cost.decode_seconds(gpu, plan, work, captured) <= 1.25 * best, (rows, longest, others)


@pytest.mark.parametrize("bounds", [False, True])
def test_decode_says_whether_lengths_are_bounds(bounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    monkeypatch.setattr(
        cost, "splits", lambda _architecture, _plan, _work, bounds, _multiprocessors: given.append(bounds) or 1
    )
    case = Case.build((2, 1, 16, 16), [5], [1])
    case.layout.bounds = bounds
    case.decode()
    assert given == [bounds]


def test_extend_takes_longer_with_fewer_programs_at_once() -> None:
    """More tokens, slower tensor cores and longer latencies take longer, too."""
    plan, gpu = plans.Plan(128, 64, warps=8, stages=2, resident=1), cost.GPUS["sm_90"]
    seconds = cost.extend_seconds(gpu, plan, 4096, 32, 8, 128)
    assert cost.extend_seconds(gpu, plan, 8192, 32, 8, 128) > 3 * seconds
    assert cost.extend_seconds(cost.GPUS["sm_80"], plan, 4096, 32, 8, 128) > seconds
    both = plans.Plan(128, 64, warps=8, stages=2, resident=2)
    assert cost.extend_seconds(gpu, both, 4096, 32, 8, 128) < seconds
