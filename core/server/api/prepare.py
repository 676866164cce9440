"""Tokenises and truncates the inputs of a request, and checks them against the model's vocabulary and length.

An error in one item begins with ``text[3]: `` and fails the request before anything is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from typing import Any, cast

from msgspec import Struct

from trunkline.core.client.slices import run_in_slices
from trunkline.core.client.truncate import (
    Truncation,
    check_characters,
    clip_text,
    read_truncate,
    special_token_counts,
    special_token_counts_of,
    too_long_error,
    truncate_ids,
)
from trunkline.core.errors import RequestError
from trunkline.core.model.sources.tokenizer import token_ids
from trunkline.core.types import EngineClient, ServedModel, Tokenizer

from .inputs import Inputs, Text, check_vocabulary, locate_errors
from .reply_schemas import TruncationReport

PROMPT_MARGIN = 256  # characters after a prompt that may change how the prompt's end is tokenised


class PreparedInput(Struct):
    """One input, ready to submit."""

    ids: list[int]
    second_at: int | None = None  # where the second text of a pair begins
    cut: bool = False  # it was truncated
    whole: int = 0  # tokens before truncation; 0 if it wasn't truncated, or was clipped before it was tokenised

    @property
    def report(self) -> TruncationReport:
        """Keys for clients about truncation; {} if the item wasn't truncated."""
        if not self.cut:
            return {}
        return {"truncated": True, "original_tokens": self.whole} if self.whole else {"truncated": True}


async def prepare_inputs(
    engine: EngineClient,
    served: ServedModel,
    inputs: Inputs,
    *,
    truncate: Truncation = None,
    limit: int | None = None,
    prompt_tokens: int = 0,
    prompt_characters: int = 0,
    preprocess: Callable[[str], str] | None = None,
) -> list[PreparedInput]:
    """Token ids of all inputs, computed off the event loop, in slices that alternate with other requests'.

    ``limit`` (tokens, special ones included) is by default the model's. ``truncate`` says which end of a longer input
    is cut off; of a pair, only the second text is truncated. ``preprocess`` is applied to each text before it is
    tokenised. If it adds a prompt at the beginning, ``prompt_characters`` is the prompt's length, and its
    ``prompt_tokens`` tokens are never cut off.
    RequestError for an empty text, ids outside the vocabulary, or an input that is too long.
    """
    preparer = InputPreparer(
        engine.tokenizer(served.name),
        served,
        truncate=truncate,
        limit=limit,
        prompt_tokens=prompt_tokens,
        prompt_characters=prompt_characters,
        preprocess=preprocess,
    )
    return await run_in_slices(engine, preparer.lengths(inputs), partial(preparer.items, inputs))


@lru_cache(maxsize=64)  # more models than one server has
def _ends_and_ids(tokenizer: Hashable) -> tuple[tuple[int, int], frozenset[int]]:
    """Numbers of special tokens that a tokenizer (or None) adds before and after a text, and all its special ids."""
    if tokenizer is None:
        return (0, 0), frozenset()
    known = cast("Tokenizer", tokenizer)
    return special_token_counts(known), frozenset(known.all_special_ids)


class InputPreparer:
    """Tokenises and truncates for one model. Only CPU work; usable without a server."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        served: ServedModel,
        *,
        truncate: Truncation = None,
        limit: int | None = None,
        prompt_tokens: int = 0,
        prompt_characters: int = 0,
        preprocess: Callable[[str], str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._served = served
        self._how = read_truncate(truncate)
        self._limit = served.max_request_tokens if limit is None else min(limit, served.max_request_tokens)
        self._ends, self._special = _ends_and_ids(cast("Hashable", tokenizer))
        self._prompt_tokens, self._prompt_characters = prompt_tokens, prompt_characters
        self._preprocess = preprocess

    def lengths(self, inputs: Inputs) -> list[int]:
        """Number of characters of each text or pair, including a prompt before it; or number of ids."""
        if not inputs.texts:
            return [len(ids) for ids in inputs.ids]
        added = self._prompt_characters
        return [len(text) + added if isinstance(text, str) else sum(map(len, text)) for text in inputs.texts]

    def items(self, inputs: Inputs, start: int = 0, end: int | None = None) -> list[PreparedInput]:
        """The items ``[start, end)`` of ``inputs``."""
        one: Callable[[Any], PreparedInput] = self._text if inputs.texts else self._ids
        every: Sequence[Any] = inputs.texts or inputs.ids
        items = []
        for index, entry in enumerate(every[start:end], start):
            with locate_errors(inputs.field, index, single=inputs.single):
                if inputs.ids:
                    check_vocabulary(entry, self._served, inputs.field)
                items.append(one(entry))
        return items

    def _ids(self, ids: list[int]) -> PreparedInput:
        return self._cut(ids, special_token_counts_of(ids, self._special, self._ends))

    def _text(self, text: Text) -> PreparedInput:
        tokenizer = check_tokenizer(self._tokenizer, self._served)
        if not isinstance(text, str):
            return self._pair(tokenizer, text[0], text[1])
        whole = text if self._preprocess is None else self._preprocess(text)
        part = clip_text(tokenizer, whole, self._limit, self._how)
        if part is not whole and self._how == "start" and self._prompt_tokens:
            # Truncation keeps only the prompt's tokens of what is added here.
            part = whole[: self._prompt_characters + PROMPT_MARGIN] + part
        ids = token_ids(tokenizer, part)
        if not whole or not ids:
            raise empty_text_error()
        head, tail = self._ends
        return self._cut(ids, (max(head, self._prompt_tokens), tail), counted=part is whole)

    def _cut(self, ids: list[int], ends: tuple[int, int], *, counted: bool = True) -> PreparedInput:
        kept, cut = truncate_ids(ids, self._limit, self._how, *ends)
        return PreparedInput(kept, cut=cut, whole=len(ids) if cut and counted else 0)

    def _pair(self, tokenizer: Tokenizer, first: str, second: str) -> PreparedInput:
        if not first or not second:
            raise empty_text_error()
        check_characters(len(first), self._limit)
        part = clip_text(tokenizer, second, self._limit, self._how)
        ids, begin, end, typed = encode_pair(tokenizer, first, part)
        second_at = begin if typed else None
        if len(ids) <= self._limit:
            return PreparedInput(ids, second_at)
        if self._how == "none":
            raise too_long_error(len(ids), self._limit)
        rest = len(ids) - (end - begin)
        if rest >= self._limit:
            raise RequestError(
                f"The first text of the pair leaves no room for the second: it has {rest} tokens with the special "
                f"ones, and the model's context length is {self._limit} tokens. Only the second is truncated."
            )
        kept, _ = truncate_ids(ids[begin:end], self._limit - rest, self._how, 0, 0)
        return PreparedInput(ids[:begin] + kept + ids[end:], second_at, True, len(ids) if part is second else 0)


def check_tokenizer(tokenizer: Tokenizer | None, served: ServedModel) -> Tokenizer:
    """RequestError when a model that was sent text has no tokenizer."""
    if tokenizer is not None:
        return tokenizer
    if served.skip_tokenizer_init:  # SGLang's words
        raise RequestError(
            "The engine initialized with skip_tokenizer_init=True cannot accept text prompts. Please provide "
            "input_ids or re-initialize the engine with skip_tokenizer_init=False."
        )
    raise RequestError(f"{served.name} has no tokenizer and cannot accept text prompts. Please provide input_ids.")


def empty_text_error() -> RequestError:
    """The error for a text without tokens, with SGLang's message."""
    return RequestError("texts cannot be empty and tokenizer must be initialized")


def encode_pair(tokenizer: Tokenizer, first: str, second: str) -> tuple[list[int], int, int, bool]:
    """Ids of a pair as the tokenizer joins it, and the range ``[begin, end)`` of the second text in them.

    The last value says whether the second text has token type 1; this depends on the tokenizer's files only, also for
    models with an embedding of token types. RequestError when the tokenizer can't say which text a token belongs to
    (one without a ``tokenizer.json``), or when the second text has no token.
    """
    join: Any = tokenizer
    joined = join(first, second)
    try:
        texts = joined.sequence_ids(0)
    except ValueError:
        raise RequestError("This model's tokenizer can't join pairs of texts; send token ids.") from None
    of_second = [index for index, text in enumerate(texts) if text == 1]
    if not of_second:
        raise empty_text_error()
    return joined["input_ids"], of_second[0], of_second[-1] + 1, 1 in joined.get("token_type_ids", ())
