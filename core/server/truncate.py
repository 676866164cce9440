"""Too long? Refuse with numbers, or cut at one end and keep the special tokens at both."""

from __future__ import annotations

from typing import Literal

from ..errors import RequestError
from ..model.tokenizer import token_ids
from ..types import Tokenizer

FIRST_LOOK = 16  # characters for each token of the limit that are looked at first; most tokens have fewer
Truncation = Literal["none", "start", "end", "NONE", "START", "END"] | bool | None
"""What bodies take: which end is cut off; true means the end, null and false none (TEI), case is free (Cohere)."""


def read_truncate(given: Truncation) -> str:
    """``"none"``, ``"start"`` or ``"end"``: which end of a text that is too long is cut off."""
    if isinstance(given, bool) or given is None:
        return "end" if given else "none"
    return given.lower()


def too_long(count: int, limit: int) -> RequestError:
    """The error for an input of ``count`` tokens where ``limit`` are allowed."""
    return RequestError(f"The input ({count} tokens) is longer than the model's context length ({limit} tokens).")


def over(limit: int) -> RequestError:
    """As :func:`too_long`, for a text of which only the beginning was counted."""
    return RequestError(
        f"The input (over {2 * limit} tokens) is longer than the model's context length ({limit} tokens)."
    )


def enough(
    tokenizer: Tokenizer, text: str, limit: int, look: int, *, from_end: bool = False, special: bool = True
) -> str:
    """``text`` itself, or so much from one end of it as has over twice ``limit`` tokens.

    ``look`` is how many characters are tried first. The time is that of a few ``limit`` tokens,
    however long the text is, unless it has hardly any tokens.
    """
    while look < len(text):
        part = text[-look:] if from_end else text[:look]
        if len(token_ids(tokenizer, part, special)) > 2 * limit:
            return part
        look *= 4  # few tokens so far, long runs of spaces say
    return text


def fit(ids: list[int], limit: int, how: str, head: int, tail: int) -> tuple[list[int], bool]:
    """At most ``limit`` ids, and whether some were cut.

    ``how`` is the end that is cut off, ``"start"`` or ``"end"``, or ``"none"``. The first ``head``
    and the last ``tail`` ids stay: the special tokens around the text. RequestError when it is too
    long and ``how`` is ``"none"``, or when nothing of the text would be left.
    """
    if len(ids) <= limit:
        return ids, False
    room = limit - head - tail
    if how == "none" or room < 1:
        raise too_long(len(ids), limit)
    last = len(ids) - tail
    first = head if how == "end" else last - room
    return ids[:head] + ids[first : first + room] + ids[last:], True


def special_ends(tokenizer: Tokenizer) -> tuple[int, int]:
    """How many special tokens the tokenizer adds before and after a text."""
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a", add_special_tokens=True)
    for head in range(len(whole) - len(plain) + 1):
        if whole[head : head + len(plain)] == plain:
            return head, len(whole) - len(plain) - head
    return 0, 0


def special_ends_of(ids: list[int], special: frozenset[int], ends: tuple[int, int]) -> tuple[int, int]:
    """As :func:`special_ends`, for ids that came without text: at most ``ends``, where special ids really stand."""
    head, tail = ends
    first = next((index for index in range(head) if index >= len(ids) or ids[index] not in special), head)
    last = next((index for index in range(tail) if index >= len(ids) or ids[-1 - index] not in special), tail)
    return first, last
