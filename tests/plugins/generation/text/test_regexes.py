"""Stop expressions: searching after each token equals a search in the whole text; window and cost are bounded."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.plugins.generation.text import regexes
from trunkline.plugins.generation.text.regexes import MAX_INSTRUCTIONS, MAX_SEARCH_COST, WINDOW, StopRegexes

PATTERNS = (r"^ab", r"a+b", r"\bba", r"é{2}", r"b$", r"\n\s*(?:a|c)", r"[^ab]c", r"x*", r"(?m)^c", r"a.c")


def stopped(patterns: list[str], pieces: list[str]) -> tuple[int, str] | None:
    """Number of pieces until the first match, and the pattern that matched."""
    stops, text = StopRegexes(patterns), ""
    for count, piece in enumerate(pieces, 1):
        text += piece
        if (found := stops.search(text)) is not None:
            return count, found
    return None


@given(
    st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=4),
    st.lists(st.text("abcé \n", min_size=1, max_size=3), max_size=12),
)
def test_the_first_match_ends_the_text(patterns: list[str], pieces: list[str]) -> None:
    """Python's expressions agree with RE2's on these, except that its ``$`` also matches before a last newline."""
    expected = None
    for count in range(1, len(pieces) + 1):
        text = "".join(pieces[:count])
        matching = [pattern for pattern in patterns if re.search(pattern.replace("$", r"\Z"), text, re.ASCII)]
        if matching:
            expected = count, matching[0]
            break
    assert stopped(patterns, pieces) == expected


def test_a_match_must_begin_in_the_window() -> None:
    stops = StopRegexes(["a-*b"])
    assert stops.window == WINDOW
    assert stops.search("a" + "-" * (WINDOW - 2) + "b") == "a-*b"
    assert stops.search("xx" + "a" + "-" * (WINDOW - 2) + "b") == "a-*b"
    assert stops.search("a" + "-" * (WINDOW - 1) + "b") is None


def test_anchors_do_not_match_at_the_beginning_of_the_window() -> None:
    text = "x" * WINDOW
    for pattern in ("^x", r"\Ax", r"\bx"):
        stops = StopRegexes([pattern])
        assert stops.search(text) == pattern
        assert stops.search("x" + text) is None, pattern


def test_a_window_that_is_too_long_by_one_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded bug: an off-by-one, which the test above detects."""
    monkeypatch.setattr(regexes, "WINDOW", WINDOW + 1)
    with pytest.raises(AssertionError):
        test_anchors_do_not_match_at_the_beginning_of_the_window()


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "missing ): ("),
        ("(?=a)", "invalid perl operator: (?="),
        (r"(a)\1", r"invalid escape sequence: \1"),
        ("(a{1000}){1000}", "invalid repetition size: {1000}"),
        (r"(\pL{1,30}){30}", "pattern too large - compile failed"),
        ("\ud800", "it is not valid Unicode"),
    ],
)
def test_patterns_that_re2_rejects(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match="can't be used") as caught:
        StopRegexes(["a", pattern])
    assert str(caught.value).endswith(reason)


def test_instructions_of_all_patterns_together_are_limited() -> None:
    stops = StopRegexes([r"\pL{3}", r"\pL{3}"])
    assert MAX_SEARCH_COST // MAX_INSTRUCTIONS <= stops.window < 200
    with pytest.raises(ValueError, match=r"the patterns need 1\d{4} instructions, and at most 8192 are allowed"):
        StopRegexes([r"\pL{3}", r"\pL{3}", r"\pL{3}"])


@pytest.mark.parametrize("pattern", [r"[a-m](.?){110}ZZ", "[a-m].{170}Z", "(a|b)*a(a|b){20}c", "(a+)+$", "(.*)*x"])
def test_hostile_patterns_are_compiled_and_searched_in_milliseconds(pattern: str) -> None:
    """They take 0.5 ms and 3 ms on an idle core; Python's own expressions take minutes for the last two."""
    began = time.perf_counter()
    stops = StopRegexes([pattern, *(f"{index}[a-m].{{1,5}}Z" for index in range(10))])
    text = "abmaqjzbaab" * 4000 + "!"
    for _ in range(3):
        assert stops.search(text) is None
    assert time.perf_counter() - began < 0.5
