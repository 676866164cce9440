"""The limits of llguidance, and what a grammar is converted to before it compiles it. Used in engine and worker."""

from __future__ import annotations

import re
from functools import cache

import llguidance
from llguidance import LLMatcher, LLTokenizer
from msgspec import Struct

from trunkline.plugins.generation.schemas import Grammar

from .ebnf import lark_of_ebnf
from .json_schema import OPTIONS, checked_schema
from .structural_tags import lark_of_tags

MAX_REGEX = 8192  # characters
_REGEX_ERROR = re.compile(r"regex parse error:.*^error: (.+?)$", re.DOTALL | re.MULTILINE)
_PLACE = re.compile(r"at [0-9]+\([0-9]+\): (?:failed to compile JSON schema: )?")  # in what the grammar is converted to
_NO_TEXT = "NoExtensionBias"
_OVERLAP = "oneOf constraints are not supported"


class Vocabulary(Struct, frozen=True):
    """What llguidance needs to know of a tokenizer. ``tokenizer``: tokenizer.json; ``size``: number of token ids."""

    tokenizer: str
    size: int
    end_ids: tuple[int, ...]

    def load(self) -> LLTokenizer:
        """ValueError for tokenizers that llguidance doesn't support. Holds the GIL: 0.3 s for 49,152 tokens."""
        return LLTokenizer(self.tokenizer, n_vocab=self.size, eos_token=list(self.end_ids))


@cache
def parser_limits() -> llguidance.LLParserLimits:
    """Steps are limited to some 10 ms; larger limits for compilation, which the worker's limits apply to as well."""
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=25_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def source_of(grammar: Grammar, tokenizer: LLTokenizer) -> str:
    """The grammar as llguidance takes it. ValueError, with the reason for the client."""
    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(checked_schema(grammar.text), overrides=OPTIONS)
    if grammar.kind == "regex":
        if len(grammar.text) > MAX_REGEX:
            raise ValueError(f"it may have at most {MAX_REGEX} characters, got {len(grammar.text)}")
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "structural_tag":
        return LLMatcher.grammar_from_lark(lark_of_tags(grammar.text, lambda text: is_special(tokenizer, text)))
    return LLMatcher.grammar_from_lark(lark_of_ebnf(grammar.text) if grammar.kind == "ebnf" else grammar.text)


def is_special(tokenizer: LLTokenizer, text: str) -> bool:
    """Whether a text is one special token of the form ``<…>``, which a grammar can name."""
    if not (text.startswith("<") and text.endswith(">")):
        return False
    ids = tokenizer.tokenize_str(text, parse_special=True)
    return len(ids) == 1 and tokenizer.is_special_token(ids[0])


def build_matcher(tokenizer: LLTokenizer, source: str) -> LLMatcher:
    """The matcher at its start. ValueError if the source isn't valid, or exceeds a limit. Releases the GIL."""
    matcher = LLMatcher(tokenizer, source, limits=parser_limits(), log_level=0)
    if matcher.is_error():
        raise ValueError(reason_of(matcher))
    return matcher


def failing_field(lark: str, tokenizer: LLTokenizer) -> str:
    """What the comment before a rule says, the first one that has a JSON Schema and can't be compiled alone; or ""."""
    field = ""
    for line in lark.split("\n"):
        if line.startswith("// "):
            field = line[3:]
        elif "%json " in line:
            rule = line.partition(":")[0]
            try:
                build_matcher(tokenizer, LLMatcher.grammar_from_lark(f"start: {rule}\n{line}"))
            except ValueError:
                return field
    return ""


def reason_of(matcher: LLMatcher) -> str:
    """Why a matcher is in its error state, for the client."""
    text = matcher.get_error().replace("<non-verbose/>", "").strip()
    if _NO_TEXT in text:
        return "no text matches it"
    if _OVERLAP in text:
        return "oneOf is supported only where no value fits two of its schemas; use anyOf"
    if (invalid := _REGEX_ERROR.search(text)) is not None:
        return f"invalid regular expression: {invalid[1]}"  # without the text, which may be long
    line = _PLACE.sub("", text.partition("\n")[0], count=1)
    return line if len(line) <= 300 else f"{line[:300]}…"
