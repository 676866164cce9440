"""One request's share of a batch."""

from __future__ import annotations

from dataclasses import dataclass

from trunkline.core.types import Request


@dataclass(slots=True)
class Row:
    """One request's share of a batch: positions ``[start, end)`` are computed; ``[0, start)`` are cached.

    The slots of ``[0, end)`` are in row ``table_row`` of the slot table; see :class:`trunkline.kernels.layout.Layout`.
    Stages get a :class:`PartRow` of it, with the place of their hidden rows instead of the slots.
    """

    request: Request
    start: int
    end: int
    table_row: int
    final: bool  # the row reaches the request's last token, so that the pass gives a result
    awaited: bool = False  # the token that it gives may be the input of the next pass, before it is known here
    source: int = -1  # where the input is still such a token: its index among those of the pass before
