"""A batch as the scheduler hands it to the runner, and the draft that it is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trunkline.core.types import Request

from .waiting import Entry


@dataclass(slots=True)
class Row:
    """One request's share of a batch: compute positions ``[start, end)`` over ``[0, start)`` cached.

    The slots of ``[0, end)`` stand in the slot table at row ``table_row``.
    """

    request: Request
    start: int
    end: int
    table_row: int

    @property
    def final(self) -> bool:
        """Does the row reach the request's last known token?"""
        return self.end == len(self.request.tokens)


@dataclass(slots=True)
class Batch:
    """Rows of one forward pass; the first ``decodes`` rows have one token each and are decoding."""

    rows: list[Row]
    decodes: int
    started: list[Request] = field(default_factory=list)  # first scheduled in this pass
    retracted: list[Request] = field(default_factory=list)  # gave their slots back: to be computed anew

    @property
    def tokens(self) -> int:
        return sum(row.end - row.start for row in self.rows)

    def without(self, keys: set[int]) -> Batch:
        """The batch less the rows of these requests."""
        decodes = sum(row.request.key not in keys for row in self.rows[: self.decodes])
        return Batch([row for row in self.rows if row.request.key not in keys], decodes)


@dataclass(slots=True)
class Draft:
    """A pass in the making."""

    budget: int  # tokens that prompts may still take
    entries: list[Entry] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    slots: int = 0  # to be allocated for the above
    started: list[Request] = field(default_factory=list)
    restarted: list[Request] = field(default_factory=list)
    retracted: list[Request] = field(default_factory=list)

    def add(self, entry: Entry, end: int) -> None:
        self.entries.append(entry)
        self.ends.append(end)
        self.slots += end - min(end, entry.allocated)


def groups(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """The rows of each forward pass: all together, but for requests that must be computed alone."""
    alone: list[Sequence[Row]] = [[row] for row in rows if row.request.alone]
    if not alone:
        return [rows]
    shared = [row for row in rows if not row.request.alone]
    return [shared, *alone] if shared else alone
