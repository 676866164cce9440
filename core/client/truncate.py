"""Cuts inputs that are too long and keeps their special tokens, or raises an error with the numbers.

To bound the time of tokenisation, the number of characters is checked before: of a text, in relation to the model's
context length, in this module; of all texts of a request, and of each slice of them, in :mod:`.slices`.
"""

from __future__ import annotations

from typing import Literal

from trunkline.core.errors import RequestError
from trunkline.core.model.sources.tokenizer import token_ids
from trunkline.core.types import Tokenizer

from .slices import SLICE

# A text may have PER_TOKEN characters for each token of the limit (most tokens have four or five), and ALLOWANCE more,
# because runs of spaces and other text of few tokens have more characters per token.
PER_TOKEN = 16
ALLOWANCE = 1 << 17
FIRST_PER_TOKEN = 6  # characters per token of the limit that are tokenised first when a text is truncated
MARGIN = 256  # tokens beyond the limit that this part must have: its last tokens may differ from the whole text's

Truncation = Literal["none", "start", "end", "NONE", "START", "END"] | bool | None
"""Field of request bodies: the end that is cut off. True is "end", null and false are "none" (TEI); case-insensitive
(Cohere)."""


def read_truncate(given: Truncation) -> str:
    """The field as ``"none"``, ``"start"`` or ``"end"``."""
    if isinstance(given, bool) or given is None:
        return "end" if given else "none"
    return given.lower()


def too_long_error(count: int, limit: int) -> RequestError:
    """The error for an input of ``count`` tokens where ``limit`` are allowed."""
    return RequestError(f"The input ({count} tokens) is longer than the model's context length ({limit} tokens).")


def most_characters(limit: int) -> int:
    """How many characters a text may have where ``limit`` tokens are allowed."""
    return PER_TOKEN * limit + ALLOWANCE


def check_characters(count: int, limit: int) -> None:
    """RequestError for a text with more than :func:`most_characters`, which is not tokenised."""
    if count > most_characters(limit):
        raise RequestError(
            f"The input ({count} characters) is longer than the model's context length ({limit} tokens), for which at "
            f"most {most_characters(limit)} characters are accepted."
        )


def clip_text(tokenizer: Tokenizer, text: str, limit: int, how: str, *, special: bool = True) -> str:
    """Clip a very long text before it is tokenised: the part at the end that is kept, with more than ``limit`` tokens.

    ``how`` as in :func:`truncate_ids`. A shorter text is returned itself (the same object). RequestError when the
    text has more than :func:`most_characters` and truncation is off, or when that many characters of it have fewer
    than ``limit`` tokens.
    """
    most = most_characters(limit)
    if how == "none":
        check_characters(len(text), limit)
        return text
    for count in (max(SLICE, FIRST_PER_TOKEN * limit), most):
        if len(text) <= count:
            return text
        part = text[-count:] if how == "start" else text[:count]
        if len(token_ids(tokenizer, part, special)) > limit + MARGIN:
            return part
    raise RequestError(
        f"The input ({len(text)} characters) can't be truncated to {limit} tokens: {most} of its characters have "
        f"fewer. Leave out long runs of spaces and very long words."
    )


def truncate_ids(ids: list[int], limit: int, how: str, head: int, tail: int) -> tuple[list[int], bool]:
    """Truncate to ``limit`` ids; the second value says whether any were removed.

    ``how`` is the end that is cut off: ``"start"``, ``"end"`` or ``"none"``. The first ``head`` and the last
    ``tail`` ids are kept, because they are the special tokens around the text. RequestError when there are too many
    ids and ``how`` is ``"none"``, or when nothing of the text would be left.
    """
    if len(ids) <= limit:
        return ids, False
    room = limit - head - tail
    if how == "none" or room < 1:
        raise too_long_error(len(ids), limit)
    last = len(ids) - tail
    first = head if how == "end" else last - room
    return ids[:head] + ids[first : first + room] + ids[last:], True


def special_token_counts(tokenizer: Tokenizer) -> tuple[int, int]:
    """How many special tokens the tokenizer adds before and after a text."""
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a", add_special_tokens=True)
    for head in range(len(whole) - len(plain) + 1):
        if whole[head : head + len(plain)] == plain:
            return head, len(whole) - len(plain) - head
    return 0, 0


def special_token_counts_of(ids: list[int], special: frozenset[int], ends: tuple[int, int]) -> tuple[int, int]:
    """As :func:`special_token_counts`, for ids that a client sent: at most ``ends``, and only ids that are special."""
    head, tail = ends
    first = next((index for index in range(head) if index >= len(ids) or ids[index] not in special), head)
    last = next((index for index in range(tail) if index >= len(ids) or ids[-1 - index] not in special), tail)
    return first, last
