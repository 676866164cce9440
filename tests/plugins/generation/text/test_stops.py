"""Finding stop strings, and the end of a text that may be the beginning of one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.plugins.generation.text.stops import find_stop, partial_stop_length

LETTERS = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@pytest.mark.parametrize(
    ("text", "stops", "found"),
    [
        ("abc", (), None),
        ("abc", ("x",), None),
        ("abcab", ("ab",), (0, "ab")),
        ("abcab", ("c", "b"), (1, "b")),
        ("abcab", ("ab", "abc"), (0, "ab")),
        ("abcab", ("abc", "ab"), (0, "abc")),
    ],
)
def test_the_earliest_stop_is_found(text: str, stops: tuple[str, ...], found: tuple[int, str] | None) -> None:
    assert find_stop(text, stops) == found


@given(LETTERS, STOPS)
def test_find_stop_against_brute_force(text: str, stops: list[str]) -> None:
    hits = [(at, rank) for at in range(len(text)) for rank, stop in enumerate(stops) if text.startswith(stop, at)]
    expected = min(hits, default=None)
    assert find_stop(text, stops) == (None if expected is None else (expected[0], stops[expected[1]]))


@given(LETTERS, LETTERS, STOPS)
def test_later_text_completes_no_stop_string_before_the_held_back_end(text: str, more: str, stops: list[str]) -> None:
    """Whatever text follows, no stop string begins in the part that isn't held back."""
    if find_stop(text, stops):
        return
    visible = text[: len(text) - partial_stop_length(text, stops)]
    found = find_stop(text + more, stops)
    assert found is None or found[0] >= len(visible)


def test_partial_stop_length() -> None:
    assert partial_stop_length("hello <", ["<end>"]) == 1
    assert partial_stop_length("hello", ["<end>"]) == 0
    assert partial_stop_length("hello", []) == 0
