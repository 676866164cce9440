"""Slots have one owner at a time; the memory behind them has the shape that kernels expect."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from trunkline.core.cache.pool import KVPool, SlotPool, SlotTable


@given(capacity=st.integers(0, 40), ops=st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=40))
def test_every_slot_is_free_or_has_one_owner(capacity: int, ops: list[tuple[bool, int]]) -> None:
    check_ownership(SlotPool(capacity), ops)


def check_ownership(pool: SlotPool, ops: list[tuple[bool, int]]) -> None:
    owned: list[np.ndarray] = []
    for allocate, number in ops:
        if allocate:
            free = pool.free
            slots = pool.allocate(number)
            assert (slots is None) == (number > free)
            if slots is not None:
                assert len(slots) == number
                assert slots.dtype == np.int32
                owned.append(slots)
        elif owned:
            pool.release(owned.pop(number % len(owned)))
        taken = [int(slot) for slots in owned for slot in slots]
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(pool.capacity))
        assert pool.free == pool.capacity - len(taken)


def test_the_property_catches_a_pool_that_forgets_to_move_on(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = SlotPool.allocate

    def forgetful(self: SlotPool, count: int) -> np.ndarray | None:
        slots = allocate(self, count)
        if slots is not None and count == 3:
            self.free += 1
        return slots

    monkeypatch.setattr(SlotPool, "allocate", forgetful)
    property_test: Any = given(ops=st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=40))
    quick = settings(database=None, derandomize=True, phases=[Phase.generate])

    @quick
    @property_test
    def run(ops: list[tuple[bool, int]]) -> None:
        check_ownership(SlotPool(40), ops)

    with pytest.raises(AssertionError):
        run()


@pytest.mark.parametrize("slots", [[0], [5, 9], [5, 5], [-1], [10], [5, 6, 5]])
def test_a_wrong_release_is_refused(slots: list[int]) -> None:
    pool = SlotPool(10)
    taken = pool.allocate(10)
    assert taken is not None
    pool.release(np.array([0, 9], dtype=np.int32))
    with pytest.raises(AssertionError, match="released"):
        pool.release(np.array(slots, dtype=np.int32))


def test_fresh_slots_are_contiguous() -> None:
    first = SlotPool(10).allocate(4)
    assert first is not None
    assert first.tolist() == [0, 1, 2, 3]


def test_table_rows_are_lent_once() -> None:
    table = SlotTable(2, 16)
    assert table.max_len == 16
    rows = {table.take(), table.take()}
    assert rows == {0, 1}
    assert table.take() is None
    table.give(1)
    assert table.take() == 1
    table.give(1)
    with pytest.raises(AssertionError, match="twice"):
        table.give(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_pool_has_one_pair_per_layer(dtype: torch.dtype) -> None:
    """With one slot more than the pool gives to requests."""
    shapes = [(2, 48, 32), (1, 16, 16)]
    pool = KVPool(shapes, 7, dtype, "cpu")
    assert [tuple(keys.shape) for keys in pool.keys] == [(8, 2, 48), (8, 1, 16)]
    assert [tuple(values.shape) for values in pool.values] == [(8, 2, 32), (8, 1, 16)]
    for tensor in (*pool.keys, *pool.values):
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert not tensor.any()
    width = (2 * (48 + 32) + 16 + 16) * dtype.itemsize
    assert KVPool.bytes_per_token(shapes, dtype) == width
    assert (7 + 1) * width == sum(tensor.nbytes for tensor in (*pool.keys, *pool.values))


def test_an_int8_pool_has_a_scale_for_each_token_and_head() -> None:
    shapes = [(2, 48, 30), (1, 16, 16)]
    pool = KVPool(shapes, 7, torch.int8, "cpu")
    assert [tuple(keys.shape) for keys in pool.keys] == [(8, 2, 52), (8, 1, 20)]
    assert [tuple(values.shape) for values in pool.values] == [(8, 2, 36), (8, 1, 20)]
    assert KVPool.bytes_per_token(shapes, torch.int8) == 2 * (52 + 36) + 20 + 20


def test_the_slot_table_notes_what_changed() -> None:
    """From the first question on."""
    table = SlotTable(3, 9)
    table.write(0, 2, np.array([5, 6], np.int32))
    assert [side.tolist() for side in table.changes()] == [[], []]
    table.write(2, 1, np.array([7, 8], np.int32))
    table.write_each([0, 1], [4, 5], np.array([1, 2], np.int32))
    assert [side.tolist() for side in table.changes()] == [[2, 2, 0, 1], [1, 2, 4, 5]]
    assert [side.tolist() for side in table.changes()] == [[], []]
    assert table.slots[2, 1:3].tolist() == [7, 8]
    assert table.slots[[0, 1], [4, 5]].tolist() == [1, 2]
