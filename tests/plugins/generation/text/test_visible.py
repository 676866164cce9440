"""Where the visible text ends if stop strings are or contain special tokens, in any chunks or at once."""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.plugins.generation.sampling.params import SamplingParams
from trunkline.plugins.generation.sequence import OutputSequence
from trunkline.plugins.generation.text import visible as module
from trunkline.plugins.generation.text.detokenizer import IncrementalDetokenizer
from trunkline.plugins.generation.text.stops import find_stop
from trunkline.plugins.generation.text.visible import VisibleText

pytestmark = pytest.mark.field

SPECIAL = ("<|im_start|>", "<|im_end|>")
PIECES = st.lists(
    st.sampled_from((*SPECIAL, "hello", " fox", "\n", "<|", "im", "|>", " ", "🙂", "é", "a")), max_size=12
)
SIZES = st.lists(st.integers(1, 6), max_size=40)


@pytest.fixture(scope="module", params=["byte_level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def generated(tokenizer: Any, prompt: list[int], tokens: list[int], stops: list[str]) -> tuple[list[int], str | None]:
    """The tokens up to the one that completes a stop string, and that string, as the engine returns them."""
    text = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=False)
    for count, token in enumerate(tokens, 1):
        text.push([token])
        if found := find_stop(text.text, stops):
            return tokens[:count], found[1]
    return tokens, None


def follow(
    tokenizer: Any, prompt: list[int], tokens: list[int], sizes: list[int], stop: str | None, **options: Any
) -> tuple[str, list[str]]:
    """The final text, and the visible text after each chunk but the last."""
    text = VisibleText(tokenizer, prompt, **options)
    seen, start = [], 0
    for size in (*sizes, len(tokens)):
        text.push(tokens[start : start + size])
        start += size
        if start < len(tokens):
            seen.append(text.so_far())
    return text.finish(stop), seen


def without_special_tokens(text: str, end: int, kept: Collection[str] = ()) -> str:
    """The characters before ``end`` that aren't part of a special token, other than those in ``kept``."""
    special = re.compile("|".join(re.escape(token) for token in SPECIAL if token not in kept) or "(?!)")
    hidden = {index for match in special.finditer(text) for index in range(*match.span())}
    return "".join(character for index, character in enumerate(text[:end]) if index not in hidden)


@given(pieces=PIECES, sizes=SIZES, data=st.data(), skip=st.booleans(), kept=st.sets(st.sampled_from(SPECIAL)))
def test_text_ends_where_the_stop_string_begins(
    byte_level: Any, pieces: list[str], sizes: list[int], data: st.DataObject, skip: bool, kept: set[str]
) -> None:
    text = "".join(pieces)
    stops = []
    for _ in range(data.draw(st.integers(0, 3))):
        start = data.draw(st.integers(0, max(0, len(text) - 1)))
        stops.append(text[start : start + data.draw(st.integers(1, 16))])
    stops = [stop for stop in stops if stop]
    prompt = byte_level.encode("hi <|im_end|>", add_special_tokens=False)
    tokens, stop = generated(byte_level, prompt, byte_level.encode(text, add_special_tokens=False), stops)
    ids = frozenset(byte_level.convert_tokens_to_ids(token) for token in kept)
    final, seen = follow(byte_level, prompt, tokens, sizes, stop, skip_special_tokens=skip, stops=stops, kept=ids)
    end = len(text) if stop is None else text.index(stop)
    assert final == (without_special_tokens(text, end, kept) if skip else text[:end])
    for shorter, longer in pairwise([*seen, final]):
        assert longer.startswith(shorter)


@given(data=st.data(), sizes=SIZES, skip=st.booleans())
def test_any_tokens_in_any_chunks_give_the_same_text(
    tokenizer: Any, data: st.DataObject, sizes: list[int], skip: bool
) -> None:
    """Also for tokens that aren't text: incomplete characters, special tokens between them."""
    ids = st.integers(0, len(tokenizer) - 1) | st.sampled_from(tokenizer.convert_tokens_to_ids(list(SPECIAL)))
    tokens = data.draw(st.lists(ids, max_size=40))
    prompt = data.draw(st.lists(ids, max_size=6))
    stops = data.draw(st.lists(st.sampled_from(("a", "h<", *SPECIAL, ">\n", "o w", "|><|")), max_size=3))
    tokens, stop = generated(tokenizer, prompt, tokens, stops)
    options = {"skip_special_tokens": skip, "stops": stops}
    whole, _ = follow(tokenizer, prompt, tokens, [], stop, **options)
    for chunks in (sizes, [1] * len(tokens)):
        final, seen = follow(tokenizer, prompt, tokens, chunks, stop, **options)
        assert final == whole
        for shorter, longer in pairwise([*seen, final]):
            assert longer.startswith(shorter)


@given(data=st.data(), skip=st.booleans())
def test_stop_strings_that_do_not_occur_change_nothing(tokenizer: Any, data: st.DataObject, skip: bool) -> None:
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    prompt = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=6))
    with_stop, _ = follow(tokenizer, prompt, tokens, [], None, skip_special_tokens=skip, stops=["\0never\0"])
    without, _ = follow(tokenizer, prompt, tokens, [], None, skip_special_tokens=skip, stops=())
    assert with_stop == without


@pytest.mark.parametrize(
    ("text", "stop", "skipped", "kept"),
    [
        ("hello<|im_start|>", "<|im_start|>", "hello", "hello"),
        ("a<|im_start|>hello<|im_end|>", "<|im_end|>", "ahello", "a<|im_start|>hello"),
        ("hello<|im_end|>\n", "<|im_end|>\n", "hello", "hello"),
        ("hello<|im_end|>", "lo<|im_end|>", "hel", "hel"),
        ("hello<|im_end|>", "|im_end|>", "hello", "hello<"),
    ],
)
def test_examples(byte_level: Any, text: str, stop: str, skipped: str, kept: str) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)
    for skip, expected in ((True, skipped), (False, kept)):
        tokens, matched = generated(byte_level, [], ids, [stop])
        assert (tokens, matched) == (ids, stop)
        final, _ = follow(byte_level, [], ids, [1] * len(ids), stop, skip_special_tokens=skip, stops=[stop])
        assert final == expected


def test_a_space_that_only_one_text_drops_shifts_no_position(metaspace: Any) -> None:
    """Decoders drop the space of the first word. Only in the text with special tokens, this word isn't the first."""
    end, *hello = metaspace.convert_tokens_to_ids(["<|im_end|>", "▁hello", "▁world"])
    for stop, text in (("world", "hello "), ("lo w", "hel"), ("hello", "")):
        final, _ = follow(metaspace, [end], hello, [], stop, skip_special_tokens=True, stops=[stop])
        assert final == text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "hello"),
        ({"no_stop_trim": True}, "hello"),
        ({"no_stop_trim": True, "skip_special_tokens": False}, "hello<|im_start|>"),
        ({"skip_special_tokens": False}, "hello"),
    ],
)
def test_trimming_and_special_tokens(byte_level: Any, options: dict[str, Any], text: str) -> None:
    ids = byte_level.encode("hello<|im_start|>", add_special_tokens=False)
    reply: Any = SimpleNamespace(tokens=ids, finish={"type": "stop", "matched": "<|im_start|>"}, error=None)
    served: Any = None
    sequence = OutputSequence(reply, [], SamplingParams(stop=("<|im_start|>",), **options), served, byte_level)
    sequence.refresh()
    assert sequence.text == text


def test_a_position_that_is_not_translated_is_detected(byte_level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded bug: the position in the searched text is used in the visible one."""
    ids = byte_level.encode("a<|im_start|>hello<|im_end|>", add_special_tokens=False)
    options = {"skip_special_tokens": True, "stops": ["<|im_end|>"]}
    assert follow(byte_level, [], ids, [], "<|im_end|>", **options)[0] == "ahello"
    monkeypatch.setattr(module.VisibleText, "_before", lambda self, position: self._visible.text[: position - 13])
    assert follow(byte_level, [], ids, [], "<|im_end|>", **options)[0] != "ahello"


def test_the_window_does_not_grow_with_special_tokens(byte_level: Any) -> None:
    """With ignore_eos a model may repeat the end token: each repetition must cost the same."""
    (end,) = byte_level.encode("<|im_end|>", add_special_tokens=False)
    text = IncrementalDetokenizer(byte_level, [])
    for _ in range(200):
        text.push([end])
    assert len(text._window) < 20
    assert text.finish() == ""
