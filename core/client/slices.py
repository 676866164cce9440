"""Divides work on many texts into slices of bounded length, between which texts of other requests are processed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from trunkline.core.errors import RequestError
from trunkline.core.types import EngineClient

SLICE = 1 << 15  # characters of one slice
MAX_CHARACTERS = 1 << 25  # of all texts of a request; a query counts once for each of its documents

T = TypeVar("T")


async def run_in_slices(
    engine: EngineClient, lengths: Iterable[int], function: Callable[[int, int], list[T]]
) -> list[T]:
    """Run ``function(start, end)`` for each slice of the texts, one after another, off the event loop.

    ``lengths``: the number of characters of each text, or of token ids of each list. Returns the concatenated
    results. RequestError when the sum exceeds the limit of a request.
    """
    results: list[T] = []
    for start, end, size in slices(lengths):
        results += await engine.off_loop(function, start, end, size=size)
    return results


def slices(lengths: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """``(start, end, size)`` of each slice: it has the texts ``[start, end)``, which have ``size`` characters.

    A slice has at most ``SLICE`` characters, or is one longer text. RequestError, before the first slice, when the
    texts together have more than ``MAX_CHARACTERS``.
    """
    sizes = list(lengths)
    if sum(sizes) > MAX_CHARACTERS:
        raise RequestError(
            f"The texts of the request have {sum(sizes)} characters, counting what is put before each of them; at most "
            f"{MAX_CHARACTERS} are accepted. Send fewer or shorter texts."
        )
    start = size = 0
    for index, length in enumerate(sizes):
        if index > start and size + length > SLICE:
            yield start, index, size
            start, size = index, 0
        size += length
    if sizes:
        yield start, len(sizes), size
