"""The batch of one forward pass, from scheduler to runner, and the draft in which the scheduler builds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trunkline.core.types import Request

from .waiting import Entry


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

    @property
    def final(self) -> bool:
        """Whether the row reaches the request's last known token, so that the pass gives a result."""
        return self.end == len(self.request.tokens)


@dataclass(slots=True)
class Batch:
    """The rows of one forward pass. The first ``decodes`` rows are decoding, with one token each."""

    rows: list[Row]
    decodes: int
    started: list[Request] = field(default_factory=list)  # run for the first time in this pass
    retracted: list[Request] = field(default_factory=list)  # lost their slots and will be recomputed

    @property
    def tokens(self) -> int:
        return sum(row.end - row.start for row in self.rows)

    def without(self, keys: set[int]) -> Batch:
        """The batch without the rows of the requests with these keys."""
        decodes = sum(row.request.key not in keys for row in self.rows[: self.decodes])
        return Batch([row for row in self.rows if row.request.key not in keys], decodes)


@dataclass(slots=True)
class Draft:
    """A batch while it is being built."""

    budget: int  # tokens that prompts may still take
    entries: list[Entry] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    slots: int = 0  # to be allocated for these entries
    started: list[Request] = field(default_factory=list)
    restarted: list[Request] = field(default_factory=list)
    retracted: list[Request] = field(default_factory=list)

    def add(self, entry: Entry, end: int) -> None:
        self.entries.append(entry)
        self.ends.append(end)
        self.slots += end - min(end, entry.allocated)


def forward_passes(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """Divide a batch's rows into forward passes: one for all rows, and one for each request that must run alone."""
    alone: list[Sequence[Row]] = [[row] for row in rows if row.request.alone]
    if not alone:
        return [rows]
    shared = [row for row in rows if not row.request.alone]
    return [shared, *alone] if shared else alone
