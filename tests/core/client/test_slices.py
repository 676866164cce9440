"""Texts divided into slices of bounded length."""

from __future__ import annotations

import pytest

from trunkline.core.client.slices import MAX_CHARACTERS, SLICE, slices
from trunkline.core.errors import RequestError


@pytest.mark.field
def test_slices_have_a_bounded_length_and_are_in_order() -> None:
    lengths = [SLICE // 3, SLICE // 2, 2 * SLICE, 0, 1]
    assert list(slices(lengths)) == [(0, 2, SLICE // 3 + SLICE // 2), (2, 3, 2 * SLICE), (3, 5, 1)]
    assert list(slices([])) == []


@pytest.mark.field
def test_all_texts_of_a_request_are_bounded_before_the_first_is_read() -> None:
    assert len(list(slices([MAX_CHARACTERS // 1024] * 1024))) == 1024
    with pytest.raises(RequestError, match=rf"{MAX_CHARACTERS + 1024} characters, .* at most {MAX_CHARACTERS}"):
        next(slices([MAX_CHARACTERS // 1024 + 1] * 1024))
