"""Ids of requests: each stands for one live sequence, or aborting by id would hit another client's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from trunkline.core.errors import RequestError


def check_rids(rids: Sequence[str], live: Collection[str] = ()) -> None:
    """RequestError for ids that occur twice in a request, or that one of the ``live`` requests has."""
    if len(set(rids)) < len(rids):
        repeated = sorted(rid for rid, count in Counter(rids).items() if count > 1)
        raise RequestError(f"Duplicate request IDs detected within the request: {repeated}", param="rid")
    for rid in rids:
        if rid in live:
            raise RequestError(f"Duplicate request ID detected: {rid}", param="rid")
