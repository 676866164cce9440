"""Work on many texts, divided into slices of bounded length, so that other requests' texts get a turn in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from trunkline.core.errors import RequestError
from trunkline.core.types import EngineClient

SLICE = 1 << 15  # characters of one slice
MAX_CHARACTERS = 1 << 25  # of all texts of a request, a query counted for each of its documents

T = TypeVar("T")


async def run_in_slices(
    engine: EngineClient, lengths: Iterable[int], function: Callable[[int, int], list[T]]
) -> list[T]:
    """The results of ``function(start, end)`` for each slice of some texts, run off the event loop, one after another.

    ``lengths`` has each text's number of characters, or a list's number of token ids. RequestError when a request
    may not have so many.
    """
    results: list[T] = []
    for start, end, size in slices(lengths):
        results += await engine.off_loop(function, start, end, size=size)
    return results


def slices(lengths: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """``(start, end, size)`` of each slice: the texts ``[start, end)``, and their number of characters.

    A slice has at most ``SLICE`` characters, or is one longer text. RequestError, before the first, when all texts
    have more than ``MAX_CHARACTERS``.
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
