"""The batch of one forward pass, from scheduler to runner, and the draft in which the scheduler builds it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from trunkline.core.cache.ledger import Ledger
from trunkline.core.types import Request

from .row import Row
from .waiting import Entry

OLDEST_SHARE = 8  # an eighth of the prompt tokens is for the prompt that was admitted first


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

    def postpone(self, keys: Collection[int]) -> tuple[Batch, Batch]:
        """The rows of all requests but ``keys``, and the rows of these, which rest, as they have no result yet."""
        if not keys:
            return self, Batch([], [], 0)
        parts = Batch([], [], 0), Batch([], [], 0)
        for index, (row, entry) in enumerate(zip(self.rows, self.entries, strict=True)):
            postponed = row.request.key in keys
            if postponed:
                entry.rest()
            part = parts[postponed]
            part.rows.append(row)
            part.entries.append(entry)
            part.decodes += index < self.decodes
        return parts


@dataclass(slots=True)
class BatchDraft:
    """A batch while it is being built. If ``whole``, prompts are in it whole or not at all, and one always is."""

    ledger: Ledger
    whole: bool
    budget: int  # tokens that prompts may still take
    ends: dict[Entry, int] = field(default_factory=dict)  # up to which token each entry is computed
    slots: int = 0  # to be allocated for these entries
    has_prompt: bool = False  # whether a prompt is in it
    started: list[Request] = field(default_factory=list)
    restarted: list[Request] = field(default_factory=list)
    retracted: list[Request] = field(default_factory=list)

    @property
    def slots_left(self) -> int:
        """Slots that can be allocated beyond those that the draft takes."""
        return self.ledger.available - self.slots

    def add(self, entry: Entry, end: int) -> None:
        """Compute the entry up to ``end``; it may be in the draft with fewer tokens."""
        start = self.ends.get(entry, entry.launched)
        self.slots += max(end, entry.allocated) - max(start, entry.allocated)
        self.ends[entry] = end

    def add_chunks(self, prefilling: Iterable[Entry]) -> int:
        """Add as much of each prompt as the token budget and free slots allow. Returns the number of all entries."""
        for entry in prefilling:
            start = self.ends.get(entry, entry.launched)
            missing = entry.length - start
            allocated = max(0, entry.allocated - start)  # slots left from a batch that was cancelled
            budget = missing if self.whole and not self.has_prompt else self.budget
            count = min(missing, budget, allocated + self.slots_left)
            if count > 0 and (count == missing or not self.whole):
                self.budget -= count
                self.has_prompt = True
                self.add(entry, start + count)
        return len(self.ends)

    def add_shares(self, prefilling: Sequence[Entry]) -> None:
        """Add prompts beside decoding requests: first those with the fewest tokens left, whose results are near.

        A share of the budget is for the prompt that was admitted first, so that a long one ends, too.
        """
        share = -(-self.budget // OLDEST_SHARE)
        self.budget, others = share, self.budget - share
        self.add_chunks(prefilling[:1])
        self.budget += others
        self.add_chunks(sorted(prefilling, key=_prompt_order))


def _prompt_order(entry: Entry) -> tuple[int, int]:
    return -entry.request.priority, entry.length - entry.launched


def forward_passes(rows: Sequence[Row]) -> list[Sequence[Row]]:
    """Divide a batch's rows into forward passes: one for all rows, and one for each request that must run alone."""
    alone: list[Sequence[Row]] = [[row] for row in rows if row.request.alone]
    if not alone:
        return [rows]
    shared = [row for row in rows if not row.request.alone]
    return [shared, *alone] if shared else alone
