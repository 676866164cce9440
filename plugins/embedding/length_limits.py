"""Checks of ``dimensions`` and ``max_tokens``."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import cast

from trunkline.core.errors import RequestError
from trunkline.core.server.api import (
    Inputs,
    PreparedInput,
    Truncation,
    locate_errors,
    read_truncate,
)
from trunkline.core.types import Tokenizer

from .recipe import Recipe
from .token_ids import special_tokens


def check_dimensions(dimensions: int | None, recipe: Recipe, field: str = "dimensions") -> None:
    """RequestError for a length to which the model's vectors can't be cut. Their full length is always allowed."""
    if dimensions is None or dimensions == recipe.dimensions:
        return
    if recipe.matryoshka is None:
        raise RequestError(
            f"{field} must be {recipe.dimensions} or left out, got {dimensions}: the model wasn't trained for "
            "shorter vectors (Matryoshka). If it was and its config doesn't say so, start the server with "
            "--matryoshka.",
            param=field,
        )
    if dimensions > recipe.dimensions:
        raise RequestError(
            f"{field} must be at most {recipe.dimensions}, the length of the model's vectors; got {dimensions}.",
            param=field,
        )
    if recipe.matryoshka and dimensions not in recipe.matryoshka:
        allowed = ", ".join(map(str, recipe.matryoshka))
        raise RequestError(f"{field} must be one of {allowed}, got {dimensions}.", param=field)


def limit_of(recipe: Recipe, max_tokens: int | None, truncate: Truncation) -> int | None:
    """The number of tokens to which inputs are cut; None is the model's.

    Where truncation is off, ``max_tokens`` is checked later, by :func:`check_max_tokens`.
    """
    if max_tokens is None or read_truncate(truncate) == "none":
        return recipe.max_length
    return max_tokens if recipe.max_length is None else min(max_tokens, recipe.max_length)


def check_room(max_tokens: int, tokenizer: Tokenizer, prompt_tokens: int) -> None:
    """RequestError when ``max_tokens`` leaves no room for a text beside its special tokens and its prompt.

    ``prompt_tokens`` includes the special tokens before the prompt.
    """
    head, tail = map(len, special_tokens(cast("Hashable", tokenizer)))
    taken = max(head, prompt_tokens) + tail
    if max_tokens <= taken:
        raise RequestError(
            f"max_tokens must be more than {taken}, the special tokens and the prompt's; got {max_tokens}.",
            param="max_tokens",
        )


def check_max_tokens(max_tokens: int, inputs: Inputs, items: Sequence[PreparedInput]) -> None:
    """RequestError for an input with more than ``max_tokens``: truncation is off, else they are short enough."""
    for index, item in enumerate(items):
        if len(item.ids) > max_tokens:
            with locate_errors(inputs.field, index, single=inputs.single):
                raise RequestError(
                    f"The input ({len(item.ids)} tokens) is longer than max_tokens ({max_tokens}). Raise max_tokens, "
                    "or set truncate to START or END."
                )
