"""What is put before a text, and how it is written, as sentence-transformers does it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from trunkline.core.errors import RequestError
from trunkline.core.types import Tokenizer

from .recipe import Recipe

SAMPLE = "THE QUICK BROWN FOX JUMPS OVER A LAZY DOG"


def choose_prompt(recipe: Recipe, prompt: str | None, name: str | None) -> str:
    """The text to put in front: the request's own, else the one it names, else the model's default."""
    if prompt is not None:
        if name is not None:
            raise RequestError("prompt and prompt_name can't be given both; leave one out.", param="prompt_name")
        return prompt
    if name is None:
        return "" if recipe.default_prompt is None else recipe.prompts[recipe.default_prompt]
    if name not in recipe.prompts:
        known = ", ".join(recipe.prompts) or "none"
        raise RequestError(f"The model has no prompt named {name!r}; there are: {known}.", param="prompt_name")
    return recipe.prompts[name]


def prompt_tokens(tokenizer: Tokenizer, recipe: Recipe, prompt: str) -> int:
    """How many tokens of a text that begins with ``prompt`` are the prompt's.

    Counted as sentence-transformers counts: the prompt alone with its special tokens, but for one at the end.
    """
    ids = tokenizer.encode(lowered(tokenizer, recipe, prompt), add_special_tokens=True)
    return len(ids) - (bool(ids) and ids[-1] in tokenizer.all_special_ids)


def dresser(tokenizer: Tokenizer | None, recipe: Recipe, prompt: str) -> Callable[[str], str] | None:
    """What makes of a text what is tokenised: the prompt before it, in lower case where needed; None for the text."""
    if tokenizer is None or not (prompt or recipe.lower_case):
        return None
    known = tokenizer
    return lambda text: lowered(known, recipe, prompt + text)


def lowered(tokenizer: Tokenizer, recipe: Recipe, text: str) -> str:
    """The text in lower case where the model asks for it and its tokenizer doesn't see to it; special tokens stay."""
    known: Any = tokenizer
    if not recipe.lower_case or _lowers(known):
        return text
    specials = tuple(getattr(tokenizer, "all_special_tokens", ()))
    return "".join(piece if piece in specials else _lower(piece) for piece in _cut(specials, text))


@lru_cache(maxsize=32)
def _lowers(tokenizer: Any) -> bool:
    encode = tokenizer.encode
    return bool(encode(SAMPLE, add_special_tokens=False) == encode(SAMPLE.lower(), add_special_tokens=False))


def _cut(specials: tuple[str, ...], text: str) -> list[str]:
    if not specials:
        return [text]
    return re.split(f"({'|'.join(map(re.escape, sorted(specials, key=len, reverse=True)))})", text)


def _lower(text: str) -> str:
    """Letter by letter, as tokenizers does: Python's own makes a sigma at the end of a word another letter."""
    return "".join(map(str.lower, text)) if "Σ" in text else text.lower()
