"""The result of all controls, which is sent from the engine to the front."""

from __future__ import annotations

from msgspec import Struct

from trunkline.core.types import Count


class Snapshot(Struct, frozen=True, kw_only=True):
    """Totals of the record since the last start or dump.

    ``counts[i][e]``: how often tokens were sent to expert ``e`` in decoder layer ``layers[i]``; each row
    adds up to ``tokens * top_k``. ``unrecorded``: number of passes that are in the counts but not in the dump,
    because of the limit on its memory. ``replicas``: the snapshots by engine replica that this one is the sum of.
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
    file: str = ""  # path of the dump, if one was written
    replicas: dict[str, Snapshot] = {}
