"""The text of a sequence doesn't depend on how its tokens are grouped."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.plugins.generation.text import detokenizer as module
from trunkline.plugins.generation.text.detokenizer import REPLACEMENT, IncrementalDetokenizer

TEXTS = st.text(st.sampled_from("ab ,.中🙂é▁\n") | st.characters(codec="utf-8"), max_size=40)
CUTS = st.lists(st.integers(1, 7), max_size=60)


@pytest.fixture(scope="module", params=["byte_level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def chunks(tokens: list[int], sizes: list[int]) -> list[list[int]]:
    """Tokens in chunks of these sizes; the last chunk has the rest."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(tokens[start : start + size])
        start += size
    return [*pieces, tokens[start:]]


def stream(tokenizer: Any, prompt: list[int], pieces: list[list[int]]) -> tuple[str, list[str]]:
    """The final text, and the text after each chunk."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    seen = []
    for piece in pieces:
        detokenizer.push(piece)
        seen.append(detokenizer.text)
    return detokenizer.finish(), seen


@settings(max_examples=150, deadline=None)
@given(prompt=TEXTS, output=TEXTS, sizes=CUTS)
def test_streamed_text_is_the_whole_text(tokenizer: Any, prompt: str, output: str, sizes: list[int]) -> None:
    before = tokenizer.encode(prompt, add_special_tokens=False)
    after = tokenizer.encode(output, add_special_tokens=False)
    head = tokenizer.decode(before[-module.PROMPT_TAIL :], skip_special_tokens=True) if before else ""
    whole = tokenizer.decode([*before[-module.PROMPT_TAIL :], *after], skip_special_tokens=True)
    final, seen = stream(tokenizer, before, chunks(after, sizes))
    assert final == whole[len(head) :]
    for shorter, longer in zip(seen, [*seen[1:], final], strict=True):
        assert longer.startswith(shorter)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), sizes=CUTS)
def test_any_tokens_in_any_chunks_give_the_same_text(tokenizer: Any, data: st.DataObject, sizes: list[int]) -> None:
    """Also for tokens that aren't text: incomplete characters, special tokens in the middle."""
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=60))
    prompt = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=8))
    one_by_one, _ = stream(tokenizer, prompt, [[token] for token in tokens])
    assert stream(tokenizer, prompt, chunks(tokens, sizes))[0] == one_by_one


def test_an_incomplete_character_is_held_back(byte_level: Any) -> None:
    tokens = byte_level.encode("x🦄y", add_special_tokens=False)
    final, seen = stream(byte_level, [], [[token] for token in tokens])
    assert final == "x🦄y"
    assert not any(REPLACEMENT in text for text in seen)
    assert seen[1] == "x"


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character(byte_level: Any) -> None:
    tokens = byte_level.encode("x🦄", add_special_tokens=False)[:-1]
    final, seen = stream(byte_level, [], [[token] for token in tokens])
    assert seen[-1] == "x"
    assert final == f"x{REPLACEMENT}"


def test_metaspace_keeps_the_space_after_the_prompt(metaspace: Any) -> None:
    hello, world = metaspace.convert_tokens_to_ids(["▁hello", "▁world"])
    assert stream(metaspace, [hello], [[world]])[0] == " world"
    assert stream(metaspace, [], [[hello], [world]])[0] == "hello world"


def test_the_text_has_nothing_of_the_prompt(byte_level: Any) -> None:
    prompt = byte_level.encode("a secret 🦄", add_special_tokens=False)
    # The prompt ends inside a character, which the first output token completes.
    final, _ = stream(byte_level, prompt[:-1], [prompt[-1:], byte_level.encode("!", add_special_tokens=False)])
    assert "secret" not in final
    assert final.endswith("!")


def test_a_window_without_context_is_detected(metaspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded bug: the shortened window has no id before the word, so the decoder drops the word's space."""
    hello, world = metaspace.convert_tokens_to_ids(["▁hello", "▁world"])
    monkeypatch.setattr(module, "WINDOW", 1)

    def forget(self: IncrementalDetokenizer, decoded: str) -> None:
        self._window, self._decoded_length = [], 0

    monkeypatch.setattr(IncrementalDetokenizer, "_shorten_window", forget)
    assert stream(metaspace, [], [[hello], [world], [world]])[0] != "hello world world"


def test_the_window_does_not_grow_with_tokens_that_are_no_text(byte_level: Any) -> None:
    broken = byte_level.encode("🦄", add_special_tokens=False)[0]
    detokenizer = IncrementalDetokenizer(byte_level, [])
    for _ in range(200):
        detokenizer.push([broken])
    assert len(detokenizer._window) < 2 * module.MAX_INCOMPLETE + module.WINDOW
    assert detokenizer.finish() == REPLACEMENT * 200
