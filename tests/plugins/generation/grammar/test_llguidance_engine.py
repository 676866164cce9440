"""Limits of compiled grammars, with llguidance itself."""

from __future__ import annotations

import llguidance
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from trunkline.plugins.generation.grammar import llguidance_engine, llguidance_source
from trunkline.plugins.generation.grammar.llguidance_engine import LlguidanceEngine, LlguidanceMatcher
from trunkline.plugins.generation.hooks import SharedLimit
from trunkline.plugins.generation.schemas import Grammar


@pytest.fixture
def engine(byte_level: PreTrainedTokenizerFast) -> LlguidanceEngine:
    return LlguidanceEngine(byte_level, len(byte_level), {byte_level.eos_token_id})


def words(engine: LlguidanceEngine) -> np.ndarray:
    return np.zeros((engine._vocab_size + 31) // 32, np.int32)


def test_a_grammar_that_takes_too_much_memory_is_refused(
    engine: LlguidanceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llguidance_engine, "MAX_GRAMMAR_BYTES", 1 << 20)
    assert engine.compile(Grammar("regex", "a")).nbytes < 1 << 20
    with pytest.raises(ValueError, match=r"it takes [0-9]+ MiB of memory when it is compiled; at most 1 are allowed"):
        engine.compile(Grammar("json_schema", '{"type": "integer", "multipleOf": 4999}'))


def test_the_lexer_fails_for_all_matchers_of_a_grammar(
    engine: LlguidanceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So their sequences need a grammar that is compiled anew."""
    limits = llguidance.LLParserLimits(max_lexer_states=60, verbose_errors=False)
    monkeypatch.setattr(llguidance_source, "parser_limits", lambda: limits)
    grammar = engine.compile(Grammar("regex", "[a-z ]*[aeiou][a-z ]{14}x"))
    other = grammar.matcher()
    other.fill(words(engine))
    with pytest.raises(SharedLimit, match="lexer error: too many states"):
        follow(grammar.matcher(), words(engine))
    with pytest.raises(SharedLimit):
        follow(other, words(engine))
    engine.compile(Grammar("regex", "[a-z ]*[aeiou][a-z ]{14}x")).matcher().fill(words(engine))


def follow(matcher: LlguidanceMatcher, mask: np.ndarray) -> None:
    for number in range(100):
        matcher.fill(mask)
        ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        matcher.accept(int(ids[number * 7919 % len(ids)]))
