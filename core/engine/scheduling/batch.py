"""The batch of one forward pass, from scheduler to runner, and the draft in which the scheduler builds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trunkline.core.types import Request

from .row import Row
from .waiting import Entry


@dataclass(slots=True)
class Batch:
    """The rows of one forward pass. The first ``decodes`` rows are decoding, with one token each."""

    rows: list[Row]
    entries: list[Entry]  # the scheduler's state of each row's request
    decodes: int
    started: list[Request] = field(default_factory=list)  # run for the first time in this pass
    retracted: list[Request] = field(default_factory=list)  # lost their slots and will be recomputed

    @property
    def tokens(self) -> int:
        return sum(row.end - row.start for row in self.rows)


@dataclass(slots=True)
class BatchDraft:
    """A batch while it is being built."""

    budget: int  # tokens that prompts may still take
    ends: dict[Entry, int] = field(default_factory=dict)  # up to which token each entry is computed
    slots: int = 0  # to be allocated for these entries
    started: list[Request] = field(default_factory=list)
    restarted: list[Request] = field(default_factory=list)
    retracted: list[Request] = field(default_factory=list)

    def start(self, entry: Entry) -> int:
        """The first token of the entry that isn't in the draft."""
        return self.ends.get(entry, entry.launched)

    def add(self, entry: Entry, end: int) -> None:
        """Compute the entry up to ``end``. It may be in the draft already, with fewer tokens."""
        self.slots += max(end, entry.allocated) - max(self.start(entry), entry.allocated)
        self.ends[entry] = end


def forward_passes(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """Divide a batch's rows into forward passes: one for all rows, and one for each request that must run alone."""
    alone: list[Sequence[Row]] = [[row] for row in rows if row.request.alone]
    if not alone:
        return [rows]
    shared = [row for row in rows if not row.request.alone]
    return [shared, *alone] if shared else alone
