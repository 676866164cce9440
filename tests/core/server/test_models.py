"""Tokenising in the front: nobody's texts hold up everybody else's."""

from __future__ import annotations

from typing import Any

import pytest

from trunkline.core.errors import RequestError
from trunkline.core.server.models import GROUP, encode_all, groups
from trunkline.core.server.truncate import FIRST_LOOK


class Words:
    """One token a word; counts the characters that it was given."""

    def __init__(self) -> None:
        self.characters = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.characters += len(text)
        return [1] * add_special_tokens + [7] * len(text.split())


def encode(text: str, limit: int | None) -> tuple[list[int], Words]:
    words: Any = Words()
    [ids] = encode_all(words, [text], True, limit)
    return ids, words


def test_a_far_too_long_text_is_refused_after_its_beginning() -> None:
    words: Any = Words()
    with pytest.raises(RequestError, match=r"over 20 tokens\) is longer than the model's context length \(10"):
        encode_all(words, ["a " * 1_000_000], True, 10)
    assert words.characters == FIRST_LOOK * 10


@pytest.mark.parametrize("text", ["a " * 80, " " * 5000 + "a b", "a" * 5000])
def test_other_texts_come_back_whole(text: str) -> None:
    assert encode(text, 10)[0] == encode(text, None)[0]


def test_a_text_of_few_tokens_is_read_a_few_times_at_most() -> None:
    text = " " * 1_000_000
    assert encode(text, 10)[1].characters < 2.5 * len(text)


def test_groups_keep_order_and_are_small() -> None:
    texts = ["a" * (GROUP // 3), "b" * (GROUP // 2), "c" * (2 * GROUP), "", "d"]
    found = list(groups(texts))
    assert [text for group in found for text in group] == texts
    assert [len(group) for group in found] == [2, 1, 2]
    assert list(groups([])) == []
