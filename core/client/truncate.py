"""Cuts inputs that are too long and keeps their special tokens, or raises an error with the numbers.

The time that tokenising takes is bounded before it begins, by numbers of characters: here those of a text in
relation to the tokens that the model takes, in :mod:`.slices` those of a request and of one piece of work.
"""

from __future__ import annotations

from typing import Literal

from trunkline.core.errors import RequestError
from trunkline.core.model.sources.tokenizer import token_ids
from trunkline.core.types import Tokenizer

from .slices import SLICE

PER_TOKEN = 16  # characters that a text may have for each token of the limit; most tokens have four or five …
ALLOWANCE = 1 << 17  # … and this many more, for runs of spaces and other text of few tokens
MOST_TOKENS_HAVE = 6  # characters: so many for each token are looked at first where a text is cut
MARGIN = 256  # tokens beyond the limit that are looked at: where a text is cut, its last ones may differ

Truncation = Literal["none", "start", "end", "NONE", "START", "END"] | bool | None
"""What bodies take: which end is cut off; true means the end, null and false none (TEI), case is free (Cohere)."""


def read_truncate(given: Truncation) -> str:
    """``"none"``, ``"start"`` or ``"end"``: which end of a text that is too long is cut off."""
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
    """RequestError for a text of so many characters that it isn't tokenised where ``limit`` tokens are allowed."""
    if count > most_characters(limit):
        raise RequestError(
            f"The input ({count} characters) is longer than the model's context length ({limit} tokens), for which at "
            f"most {most_characters(limit)} characters are accepted."
        )


def clip_text(tokenizer: Tokenizer, text: str, limit: int, how: str, *, special: bool = True) -> str:
    """``text`` itself, or of a very long one a part with more than ``limit`` tokens, from the end that is kept.

    ``how`` as in :func:`truncate_ids`. RequestError when the text may not be cut and has more than
    :func:`most_characters`, or when so many of its characters have too few tokens.
    """
    most = most_characters(limit)
    if how == "none":
        check_characters(len(text), limit)
        return text
    for look in (max(SLICE, MOST_TOKENS_HAVE * limit), most):
        if len(text) <= look:
            return text
        part = text[-look:] if how == "start" else text[:look]
        if len(token_ids(tokenizer, part, special)) > limit + MARGIN:
            return part
    raise RequestError(
        f"The input ({len(text)} characters) can't be truncated to {limit} tokens: {most} of its characters have "
        f"fewer. Leave out long runs of spaces and very long words."
    )


def truncate_ids(ids: list[int], limit: int, how: str, head: int, tail: int) -> tuple[list[int], bool]:
    """At most ``limit`` ids, and whether some were cut.

    ``how`` is the end that is cut off, ``"start"`` or ``"end"``, or ``"none"``. The first ``head``
    and the last ``tail`` ids stay: the special tokens around the text. RequestError when it is too
    long and ``how`` is ``"none"``, or when nothing of the text would be left.
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
    """As :func:`special_token_counts`, for ids that came without text: ``ends``, or as many as are special ids."""
    head, tail = ends
    first = next((index for index in range(head) if index >= len(ids) or ids[index] not in special), head)
    last = next((index for index in range(tail) if index >= len(ids) or ids[-1 - index] not in special), tail)
    return first, last
