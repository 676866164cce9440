"""Where texts end, and what must wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.plugins.generation.text.stops import find_stop, held_back

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
def test_the_earliest_stop_wins(text: str, stops: tuple[str, ...], found: tuple[int, str] | None) -> None:
    assert find_stop(text, stops) == found


@given(LETTERS, STOPS)
def test_find_stop_against_brute_force(text: str, stops: list[str]) -> None:
    hits = [(at, rank) for at in range(len(text)) for rank, stop in enumerate(stops) if text.startswith(stop, at)]
    expected = min(hits, default=None)
    assert find_stop(text, stops) == (None if expected is None else (expected[0], stops[expected[1]]))


@given(LETTERS, LETTERS, STOPS)
def test_what_is_shown_never_has_to_be_taken_back(text: str, more: str, stops: list[str]) -> None:
    """Whatever comes next, no stop string begins in the text that wasn't held back."""
    if find_stop(text, stops):
        return
    shown = text[: len(text) - held_back(text, stops)]
    found = find_stop(text + more, stops)
    assert found is None or found[0] >= len(shown)


def test_held_back_takes_no_more_than_needed() -> None:
    assert held_back("hello <", ["<end>"]) == 1
    assert held_back("hello", ["<end>"]) == 0
    assert held_back("hello", []) == 0
