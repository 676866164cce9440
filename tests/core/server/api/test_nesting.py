"""Depth of JSON against what the decoded value says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.core.server.api import nesting

values = st.recursive(
    st.none() | st.integers() | st.text(alphabet='[]{}"\\ax'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"[\\]', max_size=3), inner, max_size=3),
    max_leaves=20,
)


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(values, st.integers(nesting.MAX_DEPTH - 6, nesting.MAX_DEPTH + 1))
def test_told_as_the_decoded_value_is(value: Any, wrapped: int) -> None:
    for _ in range(wrapped):
        value = [value]
    assert nesting.too_deep(json.dumps(value).encode()) == (depth(value) > nesting.MAX_DEPTH)


def shape(value: Any) -> tuple[int, int]:
    """Arrays, objects and strings; commas."""
    if not isinstance(value, dict | list):
        return int(isinstance(value, str)), 0
    inner = [shape(one) for one in (value.values() if isinstance(value, dict) else value)]
    names = len(value) if isinstance(value, dict) else 0
    return 1 + names + sum(nodes for nodes, _ in inner), max(0, len(value) - 1) + sum(items for _, items in inner)


@pytest.mark.field
@given(value=values, block=st.integers(1, 20), space=st.sampled_from([None, 2]))
def test_values_are_counted_as_the_decoded_value_has_them(value: Any, block: int, space: int | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nesting, "_BLOCK", block)
        found = nesting.measure(json.dumps(value, indent=space).encode())
    assert (found.depth, found.nodes, found.items) == (depth(value), *shape(value))


def test_many_shallow_lists_are_not_deep() -> None:
    assert not nesting.too_deep(json.dumps({"input_ids": [[1, 2]] * 5000}).encode())


def test_brackets_in_texts_do_not_count() -> None:
    assert not nesting.too_deep(json.dumps({"text": ["[" * 10_000, '\\"[[' * 500]}).encode())
