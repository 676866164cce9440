"""The cache of compiled grammars and refusals."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from trunkline.plugins.generation.grammar.kept import GrammarCache, KeptGrammar, Refusal
from trunkline.plugins.generation.schemas import Grammar


def kept(nbytes: int) -> KeptGrammar:
    return KeptGrammar(SimpleNamespace(nbytes=nbytes), np.empty(0, np.int32))  # type: ignore[arg-type]


def test_the_cache_is_bounded_in_number_and_bytes() -> None:
    cache = GrammarCache(max_entries=3, max_bytes=1000)
    for text in "abc":
        cache.put(Grammar("regex", text), kept(100))
    assert cache.get(Grammar("regex", "a"))
    cache.put(Grammar("regex", "d"), Refusal("no"))
    assert cache.get(Grammar("regex", "b")) is None
    assert cache.get(Grammar("regex", "a"))
    assert cache.nbytes == 2 * 104 + 6
    cache.put(Grammar("regex", "e"), kept(900))
    assert len(cache) == 1
    cache.put(Grammar("regex", "f"), kept(5000))  # kept until the next one: others may ask for it at once
    assert len(cache) == 1
    cache.put(Grammar("regex", "g"), last := kept(1))
    assert cache.nbytes == 5
    cache.drop(Grammar("regex", "g"), kept(1))
    assert len(cache) == 1
    cache.drop(Grammar("regex", "g"), last)
    assert (len(cache), cache.nbytes) == (0, 0)
