"""Depth of JSON against what the decoded value says."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from trunkline.core.server import nesting

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


def test_many_shallow_lists_are_not_deep() -> None:
    assert not nesting.too_deep(json.dumps({"input_ids": [[1, 2]] * 5000}).encode())


def test_brackets_in_texts_do_not_count() -> None:
    assert not nesting.too_deep(json.dumps({"text": ["[" * 10_000, '\\"[[' * 500]}).encode())
