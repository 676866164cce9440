"""Cutting what is too long."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trunkline.core.client.slices import SLICE
from trunkline.core.client.truncate import (
    MARGIN,
    clip_text,
    most_characters,
    read_truncate,
    special_token_counts,
    special_token_counts_of,
    truncate_ids,
)
from trunkline.core.errors import RequestError


@pytest.mark.parametrize(
    ("given_", "how"),
    [(None, "none"), (False, "none"), (True, "end"), ("none", "none"), ("start", "start"), ("END", "end")],
)
def test_every_way_to_say_it(given_: Any, how: str) -> None:
    assert read_truncate(given_) == how


def test_the_named_end_is_cut_and_special_tokens_stay() -> None:
    ids = [101, 1, 2, 3, 4, 5, 102]
    assert truncate_ids(ids, 5, "end", 1, 1) == ([101, 1, 2, 3, 102], True)
    assert truncate_ids(ids, 5, "start", 1, 1) == ([101, 3, 4, 5, 102], True)
    assert truncate_ids(ids, 5, "start", 1, 0) == ([101, 3, 4, 5, 102], True)
    assert truncate_ids(ids, 7, "none", 1, 1) == (ids, False)


def test_without_truncation_the_numbers_are_told() -> None:
    with pytest.raises(RequestError, match=r"^The input \(7 tokens\) is longer than the model's context length \(5"):
        truncate_ids([0] * 7, 5, "none", 0, 0)


def test_a_limit_without_room_for_text_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"\(2 tokens\)"):
        truncate_ids([101, 1, 2, 102], 2, "end", 1, 1)


@given(
    length=st.integers(0, 40),
    limit=st.integers(3, 40),
    how=st.sampled_from(["start", "end"]),
    head=st.integers(0, 1),
    tail=st.integers(0, 1),
)
def test_what_is_left_is_as_long_as_allowed_and_in_order(
    length: int, limit: int, how: str, head: int, tail: int
) -> None:
    ids = list(range(length))
    kept, cut = truncate_ids(ids, limit, how, head, tail)
    assert len(kept) == min(length, limit)
    assert cut == (length > limit)
    assert kept == sorted(kept)
    assert kept[:head] == ids[:head]
    assert kept[len(kept) - tail :] == ids[len(ids) - tail :]
    if cut:  # the text's other end is whole
        assert kept[-tail - 1] == ids[-tail - 1] if how == "start" else kept[head] == ids[head]


@pytest.mark.parametrize(
    ("name", "ends"), [("bert", (1, 1)), ("roberta", (1, 1)), ("qwen2-base", (0, 1)), ("gemma2", (0, 0))]
)
def test_special_tokens_are_found_at_both_ends(zoo: Callable[[str], Path], name: str, ends: tuple[int, int]) -> None:
    assert special_token_counts(AutoTokenizer.from_pretrained(zoo(name))) == ends


def test_of_bare_ids_only_real_special_tokens_stay() -> None:
    special = frozenset({101, 102})
    assert special_token_counts_of([101, 5, 6, 102], special, (1, 1)) == (1, 1)
    assert special_token_counts_of([5, 6, 102], special, (1, 1)) == (0, 1)
    assert special_token_counts_of([5, 6], special, (1, 1)) == (0, 0)
    assert special_token_counts_of([101], special, (2, 0)) == (1, 0)


class Words:
    """One token a word; counts the characters it is given."""

    chat_template: str | None = None
    eos_token_id = None
    all_special_ids: list[int] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.characters = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.characters += len(text)
        return [len(word) for word in text.split()]

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        raise NotImplementedError

    def apply_chat_template(self, conversation: Any, **_: Any) -> str:
        raise NotImplementedError


SPARSE = {
    "spaces": " ",
    "one word": "a",
    "lines": "\n",
    "accents": "\u0301",
    "wide spaces": "\u3000",
    "joiners": "\u200d",
    "emoji": "\U0001f468",
}


@pytest.mark.field
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("how", ["none", "start", "end"])
def test_however_few_tokens_a_text_has_not_all_of_it_is_read(name: str, how: str) -> None:
    """A text may be one token however long it is; the time it takes is bounded by its length all the same."""
    words = Words()
    most = most_characters(10)
    with pytest.raises(RequestError, match=rf"\({4 * most} characters\)"):
        clip_text(words, SPARSE[name] * 4 * most, 10, how)
    assert words.characters <= (0 if how == "none" else SLICE + most)


@pytest.mark.field
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("how", ["none", "start", "end"])
def test_a_long_text_of_few_tokens_is_taken_as_it_is(name: str, how: str) -> None:
    text = SPARSE[name] * (most_characters(10) - 5) + " a b "
    assert clip_text(Words(), text, 10, how) is text


@pytest.mark.field
@pytest.mark.parametrize("how", ["start", "end"])
def test_of_a_very_long_text_only_the_part_that_matters_is_read(how: str) -> None:
    words = Words()
    text = "begin " + "word " * 1_000_000 + "end"
    part = clip_text(words, text, 10, how)
    assert text.endswith(part) if how == "start" else text.startswith(part)
    assert 10 + MARGIN < len(words.encode(part)) < 7000
    assert words.characters <= 2 * SLICE


@pytest.mark.field
def test_the_part_that_matters_may_lie_behind_spaces() -> None:
    text = " " * SLICE + "word " * 1_000_000
    part = clip_text(Words(), text, 10, "end")
    assert text.startswith(part)
    assert len(part) == most_characters(10)
