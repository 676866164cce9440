"""The grammar engine that comes with trunkline: llguidance, behind the hook ``trunkline_grammar_engines``."""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np

from trunkline.plugins.generation.hooks import SharedLimit
from trunkline.plugins.generation.schemas import Grammar

from .kept import MAX_GRAMMAR_BYTES
from .llguidance_source import Vocabulary, build_matcher, reason_of
from .trial import SECONDS, Trials

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from trunkline.core.types import Tokenizer

BYTES = 50_000  # of a small compiled grammar
BYTES_PER_CHARACTER = 400  # of a larger one, where its memory can't be measured
QUICK_SECONDS = 0.05  # of CPU time; ordinary grammars take 10 ms


class LlguidanceEngine:
    """Compiles grammars for one tokenizer, after a worker process has done it for trial."""

    name = "llguidance"

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Collection[int]) -> None:
        """``vocab_size``: of the model, whose logits may be more or fewer than the tokenizer's entries."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = tuple(sorted(token for token in end_ids if 0 <= token < vocab_size))
        self._lock = threading.Lock()
        self._loaded: tuple[LLTokenizer, Trials] | None = None

    def warm_up(self) -> None:
        """Load the tokenizer, if it is supported: that holds the GIL, which would stop the engine later."""
        try:
            self._load()
        except ValueError:
            return  # each request gets the reason

    def compile(self, grammar: Grammar) -> LlguidanceGrammar:
        """The compiled grammar. ValueError with the reason for the client."""
        compiled = self._compile(grammar, SECONDS)
        if compiled is None:
            raise ValueError(f"it takes more than {SECONDS:g} s of CPU time")
        return compiled

    def compile_quickly(self, grammar: Grammar) -> LlguidanceGrammar | None:
        """The same, but None if it takes more than a moment."""
        return self._compile(grammar, QUICK_SECONDS)

    def cancel(self) -> None:
        """End the compilations that run in other threads."""
        if self._loaded is not None:
            self._loaded[1].cancel()

    def _compile(self, grammar: Grammar, seconds: float) -> LlguidanceGrammar | None:
        tokenizer, trials = self._load()
        answer = trials.try_out(grammar, seconds)
        if answer is None:
            return None
        if answer.nbytes > MAX_GRAMMAR_BYTES:
            took, limit = answer.nbytes / (1 << 20), MAX_GRAMMAR_BYTES >> 20
            raise ValueError(f"it takes {took:.0f} MiB of memory when it is compiled; at most {limit} are allowed")
        nbytes = answer.nbytes or BYTES_PER_CHARACTER * len(grammar.text)
        return LlguidanceGrammar(build_matcher(tokenizer, answer.source), BYTES + nbytes)

    def _load(self) -> tuple[LLTokenizer, Trials]:
        with self._lock:
            if self._loaded is None:
                vocabulary = self._vocabulary()
                try:
                    self._loaded = vocabulary.load(), Trials(vocabulary)
                except ValueError as error:
                    raise ValueError(f"llguidance doesn't support this model's tokenizer ({error})") from error
            return self._loaded

    def _vocabulary(self) -> Vocabulary:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError("llguidance supports only tokenizers with a tokenizer.json, and this model has none")
        if not self._end_ids:
            raise ValueError("this model has no end token")
        backend = copy.copy(backend)
        backend.no_padding()
        backend.no_truncation()
        size = max(self._vocab_size, backend.get_vocab_size(with_added_tokens=True))
        return Vocabulary(backend.to_str(), size, self._end_ids)


_engines: WeakValueDictionary[tuple[int, int, frozenset[int]], LlguidanceEngine] = WeakValueDictionary()


def engine_of(tokenizer: Tokenizer, vocab_size: int, end_ids: frozenset[int]) -> LlguidanceEngine:
    """The engine for these arguments. Weight updates keep the tokenizer, and so the engine that has loaded it."""
    key = id(tokenizer), vocab_size, end_ids  # an engine keeps its tokenizer, so that no other one gets this id
    engine = _engines.get(key)
    if engine is None:
        engine = _engines[key] = LlguidanceEngine(tokenizer, vocab_size, end_ids)
    return engine


class LlguidanceGrammar:
    """A compiled grammar: a matcher at its start, which is copied."""

    def __init__(self, matcher: LLMatcher, nbytes: int) -> None:
        self._start = matcher
        self.nbytes = nbytes

    def matcher(self) -> LlguidanceMatcher:
        return LlguidanceMatcher(self._start.deep_copy())


class LlguidanceMatcher:
    """Follows one sequence."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fill(self, mask: np.ndarray) -> None:
        """See ``GrammarMatcher``. Releases the GIL."""
        words = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        if self._matcher.is_error():
            raise self._error()
        mask[:] = words[: len(mask)]

    def accept(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise self._error(f"token {token} doesn't fit")

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped()

    def _error(self, reason: str = "") -> ValueError:
        """Why the matcher has given up. The matchers of a compiled grammar share a lexer, which fails for all."""
        reason = reason_of(self._matcher) or reason
        return SharedLimit(reason) if reason.startswith("lexer error") else ValueError(reason)
