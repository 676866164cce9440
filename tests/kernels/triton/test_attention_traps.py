"""Mistakes that attention kernels of other servers had, each by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.layout import Layout, LayoutTensors
from trunkline.kernels.triton import attention_decode, attention_extend, cost
from trunkline.kernels.triton.kv_write import write

from .attention_cases import STALE, Case, assert_close

KEYS = 24  # of the row whose visible keys are looked at
PLANS = ["interpreter", "sm_90"]


def visible_keys(result: torch.Tensor) -> list[set[int]]:
    """The keys that each query of :func:`with_unit_values` saw."""
    return [set(np.flatnonzero(query.numpy()).tolist()) for query in result[:, 0]]


def with_unit_values(news: int) -> Case:
    """A row of ``KEYS`` keys, ``news`` of them new. All scores are equal, and value ``j`` is the unit vector ``j``."""
    case = Case.build((2, 1, 16, 32), [KEYS], [news])
    case.q = torch.zeros_like(case.q)
    slots = torch.from_numpy(case.layout.table[case.layout.table_row[0], :KEYS].astype(np.int64))
    case.values[slots, 0] = torch.eye(32)[:KEYS]
    case.v = torch.eye(32)[KEYS - news : KEYS, None]
    return case


@pytest.mark.parametrize("window", [1, 2, 7, KEYS - 1, KEYS, KEYS + 1, 2**40])
def test_a_window_is_a_number_of_keys_and_no_radius(window: int) -> None:
    """A query at position p sees ``window`` keys, its own among them; p - window isn't one of them."""
    expected = [{key for key in range(KEYS) if p - window < key <= p} for p in range(KEYS)]
    assert visible_keys(with_unit_values(1).decode(window=window)) == expected[-1:]
    assert visible_keys(with_unit_values(5).extend(window=window)) == expected[-5:]
    assert visible_keys(with_unit_values(KEYS).extend(pool=False, window=window)) == expected


@pytest.mark.parametrize("window", [1, 2, 7, KEYS - 1, KEYS, KEYS + 1, 2**40])
def test_a_window_in_both_directions_has_the_same_edge_on_both_sides(window: int) -> None:
    expected = [{key for key in range(KEYS) if abs(p - key) < window} for p in range(KEYS)]
    case = with_unit_values(KEYS)
    assert visible_keys(case.extend(pool=False, causal=False, window=window)) == expected


@pytest.mark.parametrize("chunk", [1, 5, 8, KEYS, 2**40])
def test_a_chunk_begins_at_its_first_key(chunk: int) -> None:
    expected = [{key for key in range(p + 1) if key // chunk == p // chunk} for p in range(KEYS)]
    assert visible_keys(with_unit_values(1).decode(chunk=chunk)) == expected[-1:]
    assert visible_keys(with_unit_values(9).extend(chunk=chunk)) == expected[-9:]


@pytest.fixture(params=PLANS)
def plans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The plans of the interpreter, and those of a GPU with several splits."""
    if request.param != "interpreter":
        for module in (attention_decode, attention_extend):
            monkeypatch.setattr(module, "architecture", lambda: request.param)
        monkeypatch.setattr(cost, "splits", lambda *_: 3)
    return str(request.param)


@pytest.mark.parametrize("width", [40, 80, 96, 112, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_dims_that_are_no_powers_of_two(width: int, dtype: torch.dtype, plans: str) -> None:
    """What pads them belongs to the next head, whose numbers are NaN here."""
    case = Case.build((4, 2, width, width), [21, 150], [1, 1], 0, dtype)
    case.keys[:, 1], case.values[:, 1] = torch.nan, torch.nan
    assert_close(case.decode()[:, :2], case.decoded()[:, :2])
    case = Case.build((4, 2, width, width), [21, 150], [4, 3], 0, dtype)
    case.k[:, 1], case.v[:, 1], case.keys[:, 1], case.values[:, 1] = [torch.nan] * 4
    assert_close(case.extend()[:, :2], case.extended()[:, :2])


class Capture:
    """A decode pass as a graph captures it: rows that only pad it have one key, in the slot that no request has.

    All else in the table is uninitialised, and the host's arrays have the largest lengths.
    """

    def __init__(self, case: Case, padding: int) -> None:
        layout, rows = case.layout, case.layout.rows
        self.unused_slot, unused_row, longest = len(case.keys), len(layout.table), 1000
        case.keys, case.values = (torch.cat([x, torch.full_like(x[:1], torch.nan)]) for x in (case.keys, case.values))
        table = torch.full((unused_row + 1, longest), STALE, dtype=torch.int32)
        table[:unused_row, : layout.table.shape[1]] = torch.from_numpy(layout.table)
        table[unused_row, 0] = self.unused_slot
        kv_len = torch.from_numpy(np.concatenate([layout.kv_len, np.ones(padding, np.int32)]))
        table_row = torch.from_numpy(np.concatenate([layout.table_row, np.full(padding, unused_row, np.int32)]))
        starts = np.arange(rows + padding + 1, dtype=np.int32)
        tensors = LayoutTensors(torch.from_numpy(starts), kv_len, table_row, table)
        bound, nowhere = np.full(rows + padding, longest, np.int32), np.full(rows + padding, unused_row, np.int32)
        slots = torch.cat([layout.out_slots, torch.full((padding,), self.unused_slot)])
        case.layout = Layout(starts, bound, nowhere, table.numpy(), slots, rows + padding, tensors)
        case.q, case.k, case.v = (torch.cat([x, x[:1].expand(padding, -1, -1)]) for x in (case.q, case.k, case.v))
        self.case = case

    def run(self) -> torch.Tensor:
        case = self.case
        write(case.k, case.v, case.keys, case.values, case.layout.out_slots)
        return case.decode(window=300)


def test_uninitialised_table_rows_at_capture(plans: str) -> None:
    """Rows that pad a graph see the key that they wrote, and nothing else; the others are as they are without them."""
    case = Case.build((4, 2, 32, 32), [1, 200, 20], [1, 1, 1])
    expected = case.decoded(window=300)
    result = Capture(case, 5).run()
    assert_close(result[:3], expected)
    own = case.v[3:].repeat_interleave(2, 1)
    assert_close(result[3:], own.double())


def test_a_graph_of_padding_only(plans: str) -> None:
    """What is captured first, before any request: no entry of the table has ever been written."""
    case = Case.build((4, 2, 32, 32), [1], [1])
    capture = Capture(case, 7)
    tensors = case.layout.on(case.q.device)
    tensors.table_row.fill_(len(tensors.table) - 1)
    case.layout.out_slots.fill_(capture.unused_slot)
    case.k[0], case.v[0] = case.k[1], case.v[1]
    tensors.table[:-1] = STALE
    assert_close(capture.run(), case.v.repeat_interleave(2, 1).double())


@pytest.mark.parametrize("window", [9, 64])
def test_values_outside_of_the_window_may_be_nan(window: int, plans: str) -> None:
    """Slots before the window may be another request's by now. Their weights are 0, but 0 times NaN is NaN."""
    for news, run in ((1, Case.decode), (3, Case.extend)):
        case = Case.build((4, 2, 32, 32), [180], [news])
        expected = case.extended(window=window)
        outside = torch.from_numpy(case.layout.table[case.layout.table_row[0], : 180 - news + 1 - window])
        case.keys[outside.long()], case.values[outside.long()] = torch.nan, torch.nan
        assert_close(run(case, window=window), expected)


def test_one_row_and_many_rows_give_the_same_bits(plans: str) -> None:
    case = Case.build((6, 2, 64, 64), [40, 33, 20], [1, 1, 1], 0, torch.bfloat16)
    together = case.decode()
    for row in range(3):
        assert torch.equal(case.decode(range(row, row + 1))[row], together[row])
