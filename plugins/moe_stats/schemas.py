"""What crosses the process boundary."""

from __future__ import annotations

from msgspec import Struct

from trunkline.core.types import Count


class Snapshot(Struct, frozen=True, kw_only=True):
    """What was recorded since the last start or dump.

    ``counts[i][e]``: how often tokens chose expert ``e`` in decoder layer ``layers[i]``; each row
    adds up to ``tokens * top_k``. ``unrecorded`` passes are in the counts but not in the dump's
    records, for which there was no memory.
    """

    model: str
    mode: str
    recording: bool
    passes: Count
    tokens: Count
    top_k: Count  # 0 = nothing was recorded
    depth: Count  # decoder layers, dense ones too
    experts: Count
    layers: list[Count]
    counts: list[list[Count]]
    unrecorded: Count = 0
    file: str = ""  # of the dump, where one was written
