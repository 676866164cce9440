"""Attention over several new tokens in the checked interpreter, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.triton import attention_extend, plans

from .attention_cases import HALF, PAIRS, RULES, WIDTHS, Case, assert_close, rules_for


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_prefix_and_new_tokens(widths: tuple[int, int, int, int], rule: dict[str, Any]) -> None:
    """A whole prompt, a short and a long extension over a prefix, a single token; 80 keys are more than a tile."""
    case, rules = Case.build(widths, [12, 80, 41, 7], [12, 3, 30, 1]), rules_for(rule, widths[0])
    assert_close(case.extend(**rules), case.extended(**rules))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("widths", "rule"), PAIRS, ids=str)
def test_half_precision(widths: tuple[int, int, int, int], rule: dict[str, Any], dtype: torch.dtype) -> None:
    """In a pool of the same dtype, or of float32; and without one, in both directions."""
    rules = rules_for(rule, widths[0])
    for pool_dtype in (dtype, torch.float32):
        case = Case.build(widths, [70, 41], [3, 30], 0, dtype, pool_dtype)
        assert_close(case.extend(**rules), case.extended(**rules))
    case = Case.build(widths, [5, 30], [5, 30], 0, dtype)
    assert_close(case.extend(pool=False, causal=False, **rules), case.extended(pool=False, causal=False, **rules))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_packed_without_a_pool(causal: bool, rule: dict[str, Any]) -> None:
    case = Case.build((6, 2, 48, 32), [1, 5, 70], [1, 5, 70])
    rules = rules_for(rule, 6) | {"causal": causal}
    assert_close(case.extend(pool=False, **rules), case.extended(pool=False, **rules))


@pytest.mark.parametrize("plan", [plans.Plan(16, 16), plans.Plan(32, 64), plans.Plan(64, 32)], ids=str)
@pytest.mark.parametrize("widths", [(9, 3, 32, 32), (20, 1, 16, 16), (10, 2, 32, 32)], ids=str)
def test_blocks_of_other_sizes(
    plan: plans.Plan, widths: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups that don't divide a block, or are larger; rows that end within a block and at its end."""
    monkeypatch.setattr(plans, "extend", lambda *_: plan)
    case = Case.build(widths, [3, 40, 21, 1, 16], [3, 17, 5, 1, 16])
    for rules in ({}, {"window": 10}):
        assert_close(case.extend(**rules), case.extended(**rules))


def test_many_short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program finds its row, whatever the rows' lengths."""
    monkeypatch.setattr(plans, "extend", lambda *_: plans.Plan(16, 16))
    news = [1, 9, 2, 16, 1, 1, 8, 3, 7, 1]
    case = Case.build((2, 1, 16, 16), [new + at for at, new in enumerate(news)], news)
    assert_close(case.extend(), case.extended())


@pytest.mark.parametrize("rule", [{"window": 9}, {"chunk": 9}], ids=str)
def test_values_outside_of_the_window_are_not_read(rule: dict[str, Any]) -> None:
    """With 3 queries and a window of 9, only the last 11 keys are visible to any."""
    case = Case.build((4, 2, 32, 32), [9 * 8], [3])
    expected = case.extended(**rule)
    foreign = torch.from_numpy(case.layout.table[case.layout.table_row[0], : 9 * 7].astype(np.int64))
    foreign = foreign if "chunk" in rule else foreign[:-2]
    case.keys[foreign], case.values[foreign] = torch.nan, torch.nan
    assert_close(case.extend(**rule), expected)


def test_a_row_does_not_depend_on_the_others() -> None:
    case = Case.build((6, 2, 64, 64), [40, 33, 20], [10, 33, 1])
    together, starts = case.extend(), case.layout.q_start
    for row in range(3):
        own = slice(int(starts[row]), int(starts[row + 1]))
        alone = case.extend(rows=range(row, row + 1))
        assert torch.equal(alone[own], together[own])
        assert int(torch.isnan(alone[:, 0, 0]).sum()) == len(alone) - (own.stop - own.start)


def test_rows_must_be_consecutive() -> None:
    case = Case.build((2, 1, 16, 16), [5, 5, 5], [1, 1, 1])
    with pytest.raises(ValueError, match="consecutive"):
        attention_extend.extend(
            case.q, case.k, case.v, None, None, case.layout, [0, 2], torch.empty(3, 2, 16), scale=1.0
        )
