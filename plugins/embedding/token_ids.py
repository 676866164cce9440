"""Checks of token ids that clients send, which may be those of another tokenizer."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Any, cast

from trunkline.core.errors import RequestError
from trunkline.core.server.api import Inputs, check_vocabulary, locate_errors, special_token_counts
from trunkline.core.types import ServedModel, Tokenizer

LANGCHAIN = "Send text instead (LangChain's OpenAIEmbeddings: check_embedding_ctx_length=False)"


def check_ids(inputs: Inputs, served: ServedModel) -> None:
    """RequestError for ids outside the vocabulary, which are from another tokenizer."""
    advice = f"Were they made with another model's tokenizer? {LANGCHAIN}, or ids of this model's tokenizer."
    for index, ids in enumerate(inputs.ids):
        with locate_errors(inputs.field, index, single=inputs.single):
            check_vocabulary(ids, served, inputs.field, advice=advice)


def check_special_tokens(inputs: Inputs, tokenizer: Tokenizer | None) -> None:
    """RequestError for ids without the special tokens that this tokenizer adds to every text.

    Clients of OpenAI's API may send ids of OpenAI's tokenizer (LangChain does by default), most of which are in the
    vocabularies of other models, too. If the tokenizer adds no special tokens, all ids are accepted.
    """
    if tokenizer is None or not inputs.ids:
        return
    head, tail = special_tokens(cast("Hashable", tokenizer))
    for index, ids in enumerate(inputs.ids):
        if ids[: len(head)] == list(head) and ids[max(len(head), len(ids) - len(tail)) :] == list(tail):
            continue
        places = [f"begin with {tokenizer.decode(head)} {[*head]}"] if head else []
        places += [f"end with {tokenizer.decode(tail)} {[*tail]}"] if tail else []
        with locate_errors(inputs.field, index, single=inputs.single):
            raise RequestError(
                f"The token ids don't {' and '.join(places)}, as all that this model's tokenizer makes do: they seem "
                f"to be another tokenizer's. {LANGCHAIN}, or start the server with --embedding-ids trust."
            )


@lru_cache(maxsize=64)  # more models than one server has
def special_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer adds before and after each text."""
    head, tail = special_token_counts(tokenizer)
    ids = tokenizer.encode("a", add_special_tokens=True)
    return tuple(ids[:head]), tuple(ids[len(ids) - tail :])
