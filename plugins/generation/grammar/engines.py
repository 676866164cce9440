"""Chooses the grammar engine of a model."""

from __future__ import annotations

from collections.abc import Iterable
from weakref import WeakValueDictionary

from trunkline.core.errors import ConfigError
from trunkline.core.types import Contribution

from .compiler import GrammarCompiler

OWN = "llguidance"

_compilers: WeakValueDictionary[tuple[int, int], GrammarCompiler] = WeakValueDictionary()


def choose_engine(contributions: Iterable[Contribution], backend: str, vocab_size: int) -> GrammarCompiler:
    """The compiler for ``--grammar-backend``. ConfigError for the name of no engine.

    ``contributions``: the grammar engines of plugins. "auto" is llguidance, or the first other one; "none" none.
    """
    engines: dict[str, Contribution] = {}
    for each in contributions:
        name = getattr(each.value, "name", None)
        if not isinstance(name, str) or not callable(getattr(each.value, "compile", None)):
            raise each.failed(f"{type(each.value).__name__} needs a name, a string, and a method compile")
        engines.setdefault(name, each)
    if backend == "none":
        reason = "{field} is switched off on this server (--grammar-backend none); leave it out."
        return GrammarCompiler(None, vocab_size, reason)
    if backend == "auto":
        chosen = engines.get(OWN) or next(iter(engines.values()), None)
    elif backend in engines:
        chosen = engines[backend]
    elif backend == OWN:
        chosen = None  # the model has no tokenizer
    else:
        known = ", ".join(dict.fromkeys(("auto", "none", OWN, *engines)))
        raise ConfigError(f"--grammar-backend {backend!r}: there is no such grammar engine; choose one of {known}.")
    if chosen is None:
        return GrammarCompiler(None, vocab_size, "{field} needs a tokenizer, and this model has none; leave it out.")
    return _compiler_of(chosen, vocab_size)


def _compiler_of(engine: Contribution, vocab_size: int) -> GrammarCompiler:
    """The compiler of an engine. Weight updates keep the engine, and so the grammars that are compiled already."""
    key = id(engine.value), vocab_size  # a compiler keeps its engine, so that no other one gets this id
    compiler = _compilers.get(key)
    if compiler is None or compiler.closed:
        compiler = _compilers[key] = GrammarCompiler(engine, vocab_size)
    return compiler
