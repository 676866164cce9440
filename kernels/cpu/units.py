"""Divides a product with packed weights among threads: a unit of work is a block of rows times one panel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

from .threads import OPTIONS, claim, threads

_CLAIM = 1 << 18  # multiply-adds that a thread claims at a time: enough to make the claim's cost negligible
_NEIGHBOURS = 8  # panels that a thread claims at a time, so that the panel that it prefetches is its own next one
SHARES = 8  # of each thread: at least as many units, so that threads finish at the same time
TILE = 12  # rows that blocks are a multiple of: small tiles take longer for each row


def _even_block(a: Any) -> Any:
    """Rows of a block, at most ``a.block`` (a multiple of TILE), so that no block has only a few of ``a.rows``."""
    blocks = (a.rows + a.block - 1) // a.block
    return min(a.rows, (a.rows + blocks * TILE - 1) // (blocks * TILE) * TILE)


even_block = njit(**OPTIONS)(_even_block)


def for_each_unit(columns: int, multiply: Callable[[Any, int, int, int], None]) -> Any:
    """Compiled ``run(a, panels)``, which calls ``multiply(a, panel, first row, last row)`` for its share of the units.

    ``columns`` of a panel. ``a`` has the fields ``rows``, ``block`` (rows of a unit), ``inputs`` and ``claimed``.
    """
    multiply = njit(**OPTIONS)(multiply)

    def run(a: Any, panels: int) -> None:
        block = even_block(a)
        units = panels * ((a.rows + block - 1) // block)
        chunk = max(_NEIGHBOURS, _CLAIM // (columns * a.inputs * block))
        chunk = max(1, min(chunk, units // (SHARES * threads())))
        first = claim(a, chunk)
        while first < units:
            for unit in range(first, min(first + chunk, units)):
                m = unit // panels * block
                multiply(a, unit % panels, m, min(m + block, a.rows))
            first = claim(a, chunk)

    return njit(**OPTIONS)(run)
