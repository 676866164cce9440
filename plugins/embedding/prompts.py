"""Prompts before texts, and lower-casing, as in sentence-transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from trunkline.core.errors import RequestError
from trunkline.core.types import Tokenizer

from .recipe import Recipe

PROMPTS_FOR: dict[str, tuple[str, ...]] = {
    "search_query": ("query",),
    "search_document": ("document", "passage", "corpus"),
    "classification": (),
    "clustering": (),
}
"""Cohere's ``input_type`` -> names of prompts for it beside its own, those of sentence-transformers' encode_query and
encode_document."""

SAMPLE = "THE QUICK BROWN FOX JUMPS OVER A LAZY DOG"


def choose_prompt(recipe: Recipe, prompt: str | None, name: str | None) -> str:
    """The prompt: the request's own, else the one it names, else the model's default."""
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


def prompt_for_input_type(recipe: Recipe, input_type: str) -> str:
    """The model's prompt for one of Cohere's input types, whatever the case of its name; without one, its default.

    RequestError for an unknown input type.
    """
    if input_type not in PROMPTS_FOR:
        images = " This server takes text only." if input_type == "image" else ""
        raise RequestError(
            f"input_type must be one of {', '.join(PROMPTS_FOR)}, got {input_type!r}.{images}", param="input_type"
        )
    by_name = {name.lower(): prompt for name, prompt in recipe.prompts.items()}
    for name in (input_type, *PROMPTS_FOR[input_type]):
        if name in by_name:
            return by_name[name]
    return choose_prompt(recipe, None, None)


def prompt_tokens(tokenizer: Tokenizer, recipe: Recipe, prompt: str) -> int:
    """Number of tokens of the prompt in a text that begins with ``prompt``.

    Counted as in sentence-transformers: the tokens of the prompt alone with special tokens, without one at the end.
    """
    ids = tokenizer.encode(lowered(tokenizer, recipe, prompt), add_special_tokens=True)
    return len(ids) - (bool(ids) and ids[-1] in tokenizer.all_special_ids)


def text_preprocessor(tokenizer: Tokenizer | None, recipe: Recipe, prompt: str) -> Callable[[str], str] | None:
    """A function that adds the prompt to a text and lower-cases it if the model needs that; None if neither applies."""
    if tokenizer is None or not (prompt or recipe.lower_case):
        return None
    known = tokenizer
    return lambda text: lowered(known, recipe, prompt + text)


def lowered(tokenizer: Tokenizer, recipe: Recipe, text: str) -> str:
    """The text, lower-cased except for special tokens if the model needs it and its tokenizer doesn't do it."""
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
    """Lower-case each letter by itself, as the library tokenizers does: ``str.lower`` has a rule for final sigmas."""
    return "".join(map(str.lower, text)) if "Σ" in text else text.lower()
