"""Paged decode attention in the checked interpreter, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.layout import Layout, LayoutTensors
from trunkline.kernels.triton import attention_decode, cost

from .attention_cases import HALF, PAIRS, RULES, WIDTHS, Case, assert_close, rules_for


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``split(n)``: the plans of a GPU, and ``n`` splits per row."""

    def force(count: int) -> None:
        monkeypatch.setattr(attention_decode, "architecture", lambda: "sm_90")
        monkeypatch.setattr(cost, "splits", lambda *_: count)

    return force


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_the_reference(widths: tuple[int, int, int, int], rule: dict[str, Any]) -> None:
    case, rules = Case.build(widths, [1, 17, 70], [1, 1, 1]), rules_for(rule, widths[0])
    assert_close(case.decode(**rules), case.decoded(**rules))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("widths", "rule"), PAIRS, ids=str)
def test_half_precision(widths: tuple[int, int, int, int], rule: dict[str, Any], dtype: torch.dtype) -> None:
    """In a pool of the same dtype, or of float32."""
    for pool_dtype in (dtype, torch.float32):
        case, rules = Case.build(widths, [1, 17, 70], [1, 1, 1], 0, dtype, pool_dtype), rules_for(rule, widths[0])
        assert_close(case.decode(**rules), case.decoded(**rules))


@pytest.mark.parametrize("count", [2, 3, 40])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_splits_are_combined(rule: dict[str, Any], count: int, split: Any) -> None:
    """Of 300 keys, at most three splits of 128 have any; the others' results are never written, nor read."""
    split(count)
    case, rules = Case.build((6, 2, 80, 48), [1, 129, 300], [1, 1, 1]), rules_for(rule, 6)
    assert_close(case.decode(**rules), case.decoded(**rules))


def test_more_splits_than_are_read_at_a_time(split: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    split(5)
    monkeypatch.setattr(attention_decode, "COMBINED", 2)
    case = Case.build((2, 1, 16, 16), [640], [1])
    assert_close(case.decode(), case.decoded())


@pytest.mark.parametrize("heads", [18, 33])
def test_groups_of_more_heads_than_a_program_computes(heads: int, split: Any) -> None:
    split(2)
    case = Case.build((2 * heads, 2, 32, 32), [5, 150], [1, 1])
    assert_close(case.decode(), case.decoded())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rule", [{"window": 9}, {"chunk": 9}], ids=str)
def test_values_outside_of_the_window_are_not_read(rule: dict[str, Any], count: int, split: Any) -> None:
    """A window of 9 is exactly the last 9 keys; slots before it may belong to another row by now."""
    split(count)
    case = Case.build((4, 2, 32, 32), [9 * 20], [1])
    expected = case.decoded(**rule)
    foreign = torch.from_numpy(case.layout.table[case.layout.table_row[0], : 9 * 19].astype(np.int64))
    case.keys[foreign], case.values[foreign] = torch.nan, torch.nan
    assert_close(case.decode(**rule), expected)
    case.values[int(case.layout.table[case.layout.table_row[0], 9 * 19])] = torch.nan
    assert torch.isnan(case.decode(**rule)).all(), "the first key of the window is visible"


def test_a_row_does_not_depend_on_the_others() -> None:
    """One row and many rows give the same bits."""
    case = Case.build((6, 2, 64, 64), [40, 33, 20], [1, 1, 1])
    together = case.decode()
    for row in range(3):
        alone = case.decode(range(row, row + 1))
        assert torch.equal(alone[row], together[row])
        assert torch.isnan(alone[[r for r in range(3) if r != row]]).all(), "other rows aren't written"


@pytest.mark.parametrize("count", [1, 3])
def test_lengths_are_read_from_tensors(count: int, split: Any) -> None:
    """The host's arrays are only bounds, as in a CUDA graph that is replayed with other rows."""
    split(count)
    case = Case.build((4, 2, 32, 32), [200, 3], [1, 1])
    expected, layout = case.decoded(), case.layout
    tensors = LayoutTensors(
        *(torch.from_numpy(one) for one in (layout.q_start, layout.kv_len, layout.table_row, layout.table))
    )
    bound, nowhere = np.full(2, 1000, np.int32), np.full(2, 2**30, np.int32)
    case.layout = Layout(layout.q_start, bound, nowhere, layout.table, layout.out_slots, 2, tensors)
    assert_close(case.decode(), expected)


def test_rows_must_be_consecutive() -> None:
    case = Case.build((2, 1, 16, 16), [5, 5, 5], [1, 1, 1])
    with pytest.raises(ValueError, match="consecutive"):
        case.decode(range(0, 3, 2))


def test_heads_that_are_too_wide(split: Any) -> None:
    split(1)
    with pytest.raises(ValueError, match="only up to 256"):
        Case.build((2, 1, 260, 16), [5], [1]).decode()
