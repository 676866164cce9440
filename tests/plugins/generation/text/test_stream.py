"""The text of a sequence doesn't depend on how its tokens arrive."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.plugins.generation.text import stream as text_module
from trunkline.plugins.generation.text.stream import UNKNOWN, TextStream

TEXTS = st.text(st.sampled_from("ab ,.中🙂é▁\n") | st.characters(codec="utf-8"), max_size=40)
CUTS = st.lists(st.integers(1, 7), max_size=60)


@pytest.fixture(scope="module", params=["byte_level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def chunks(tokens: list[int], sizes: list[int]) -> list[list[int]]:
    """Tokens cut into pieces of these sizes, the rest in one."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append(tokens[at : at + size])
        at += size
    return [*pieces, tokens[at:]]


def stream(tokenizer: Any, prompt: list[int], pieces: list[list[int]]) -> tuple[str, list[str]]:
    """Final text, and what was visible after each piece."""
    follower = TextStream(tokenizer, prompt)
    seen = []
    for piece in pieces:
        follower.push(piece)
        seen.append(follower.text)
    return follower.finish(), seen


@settings(max_examples=150, deadline=None)
@given(prompt=TEXTS, output=TEXTS, sizes=CUTS)
def test_streamed_text_is_the_whole_text(tokenizer: Any, prompt: str, output: str, sizes: list[int]) -> None:
    before = tokenizer.encode(prompt, add_special_tokens=False)
    after = tokenizer.encode(output, add_special_tokens=False)
    head = tokenizer.decode(before[-text_module.PROMPT_TAIL :], skip_special_tokens=True) if before else ""
    whole = tokenizer.decode([*before[-text_module.PROMPT_TAIL :], *after], skip_special_tokens=True)
    final, seen = stream(tokenizer, before, chunks(after, sizes))
    assert final == whole[len(head) :]
    for shorter, longer in zip(seen, [*seen[1:], final], strict=True):
        assert longer.startswith(shorter)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), sizes=CUTS)
def test_any_tokens_in_any_chunks_give_the_same_text(tokenizer: Any, data: st.DataObject, sizes: list[int]) -> None:
    """Also tokens that are no text: half characters, special tokens in the middle."""
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=60))
    prompt = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=8))
    one_by_one, _ = stream(tokenizer, prompt, [[token] for token in tokens])
    assert stream(tokenizer, prompt, chunks(tokens, sizes))[0] == one_by_one


def test_half_a_character_waits(byte_level: Any) -> None:
    tokens = byte_level.encode("x🦄y", add_special_tokens=False)
    final, seen = stream(byte_level, [], [[token] for token in tokens])
    assert final == "x🦄y"
    assert not any(UNKNOWN in text for text in seen)
    assert seen[1] == "x"


def test_a_character_that_never_completes_shows_at_the_end_only(byte_level: Any) -> None:
    tokens = byte_level.encode("x🦄", add_special_tokens=False)[:-1]
    final, seen = stream(byte_level, [], [[token] for token in tokens])
    assert seen[-1] == "x"
    assert final == f"x{UNKNOWN}"


def test_metaspace_keeps_the_space_after_the_prompt(metaspace: Any) -> None:
    hello, world = metaspace.convert_tokens_to_ids(["▁hello", "▁world"])
    assert stream(metaspace, [hello], [[world]])[0] == " world"
    assert stream(metaspace, [], [[hello], [world]])[0] == "hello world"


def test_the_prompt_never_shows(byte_level: Any) -> None:
    prompt = byte_level.encode("a secret 🦄", add_special_tokens=False)
    # the prompt ends inside a character which the first output token completes
    final, _ = stream(byte_level, prompt[:-1], [prompt[-1:], byte_level.encode("!", add_special_tokens=False)])
    assert "secret" not in final
    assert final.endswith("!")


def test_the_property_catches_a_window_without_context(metaspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded bug: the window is moved without keeping a token that holds the place of the space."""
    hello, world = metaspace.convert_tokens_to_ids(["▁hello", "▁world"])
    monkeypatch.setattr(text_module, "WINDOW", 1)

    def forget(self: TextStream, decoded: str) -> None:
        self._window, self._done = [], 0

    monkeypatch.setattr(TextStream, "_move", forget)
    assert stream(metaspace, [], [[hello], [world], [world]])[0] != "hello world world"


def test_endless_garbage_does_not_pile_up(byte_level: Any) -> None:
    broken = byte_level.encode("🦄", add_special_tokens=False)[0]
    follower = TextStream(byte_level, [])
    for _ in range(200):
        follower.push([broken])
    assert len(follower._window) < 2 * text_module.PATIENCE + text_module.WINDOW
    assert follower.finish() == UNKNOWN * 200
