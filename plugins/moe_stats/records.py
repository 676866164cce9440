"""Records of passes in the three layouts of SGLang's dump files. All tensors are on the CPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trunkline.core.types import PassRow

Ints = NDArray[np.int64]

RANK = 0
EXTEND, DECODE, MIXED = 1, 2, 3  # SGLang's forward modes
LEAST_WIDTH = 8  # smallest number of columns per token that readers of the files expect


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass, without rows of health probes and warm-up.

    ``rows`` are packed in this order. ``chosen``: the experts of each token, int64 ``[L, T, k]``, in the ``layers``
    with experts. ``counts``: int64 ``[depth, experts]``, with zeros for layers without experts.
    """

    number: int
    rows: Sequence[PassRow]
    layers: Sequence[int]
    chosen: Ints
    counts: Ints

    @property
    def tokens(self) -> int:
        return int(self.chosen.shape[1])


class Records(ABC):
    """Stores passes until they are dumped, in at most ``limit`` bytes."""

    per_rank = False  # whether SGLang's file name has the rank

    def __init__(self, depth: int, experts: int, limit: int) -> None:
        self.shape = (depth, experts)
        self.limit = limit
        self.bytes = 0
        self.refused = 0  # number of passes that would have exceeded the limit

    def add(self, one: Pass) -> None:
        """Store a pass, unless it would exceed the limit."""
        needed = self.size(one)
        if self.bytes + needed > self.limit:
            self.refused += 1
            return
        self.bytes += needed
        self.keep(one)

    @abstractmethod
    def size(self, one: Pass) -> int:
        """Bytes that storing the pass would take."""

    @abstractmethod
    def keep(self, one: Pass) -> None:
        """Store the pass."""

    @abstractmethod
    def contents(self) -> dict[str, Any]:
        """The content of the dump: only tensors, numbers, strings, lists and dicts."""


class StatRecords(Records):
    """Counts, ``[entries, depth, experts]``, one entry per pass.

    SGLang overwrites the oldest passes when its buffer is full. Here, the oldest entry is added to the second oldest,
    so that the sum over all entries is exact.
    """

    def __init__(self, depth: int, experts: int, limit: int, entries: int) -> None:
        super().__init__(depth, experts, limit)
        self._fixed = entries > 0
        self._room = entries if self._fixed else max(1, limit // (depth * experts * 8))
        self._entries: list[Ints] = []
        self._first = 0  # index of the oldest entry

    def size(self, one: Pass) -> int:
        return 0  # bounded by the number of entries

    def keep(self, one: Pass) -> None:
        if len(self._entries) < self._room:
            self._entries.append(one.counts.copy())
        elif self._room == 1:
            self._entries[0] += one.counts
        else:
            following = (self._first + 1) % self._room
            self._entries[following] += self._entries[self._first]
            self._entries[self._first] = one.counts.copy()
            self._first = following

    def contents(self) -> dict[str, Any]:
        used = self._entries[self._first :] + self._entries[: self._first]
        table = torch.zeros(self._room if self._fixed else len(used), *self.shape, dtype=torch.int64)
        for index, counts in enumerate(used):
            table[index] = torch.from_numpy(counts)
        return {"rank": RANK, "logical_count": table, "average_utilization_rate_over_window": None}


class PassRecords(Records):
    """One record per pass, with its counts."""

    per_rank = True

    def __init__(self, depth: int, experts: int, limit: int) -> None:
        super().__init__(depth, experts, limit)
        self._records: list[dict[str, Any]] = []

    def size(self, one: Pass) -> int:
        return int(one.counts.nbytes) + 1024  # the dict and its tensor object

    def keep(self, one: Pass) -> None:
        self._records.append({
            "forward_pass_id": one.number,
            "rank": RANK,
            "gatherer_key": "primary",
            "global_physical_count": torch.from_numpy(one.counts.copy()),
        })  # fmt: skip

    def contents(self) -> dict[str, Any]:
        depth, experts = self.shape
        return {
            "records": list(self._records),
            "last_physical_to_logical_map": torch.arange(experts).expand(depth, experts).contiguous(),
        }


class TokenRecords(PassRecords):
    """One record per pass, with the id, position, request and experts of every token."""

    def size(self, one: Pass) -> int:
        depth, _ = self.shape
        width: int = max(LEAST_WIDTH, one.chosen.shape[2])
        names = sum(len(row.request.rid) for row in one.rows)
        lists = 2 * 40  # bytes that a token's id and position take in lists
        return super().size(one) + one.tokens * (depth * width * 4 + lists) + names

    def keep(self, one: Pass) -> None:
        super().keep(one)
        width: int = max(LEAST_WIDTH, one.chosen.shape[2])
        choices = torch.full((self.shape[0], one.tokens, width), -1, dtype=torch.int32)
        choices[list(one.layers), :, : one.chosen.shape[2]] = torch.from_numpy(one.chosen).to(torch.int32)
        mode = forward_mode(one.rows)
        self._records[-1] |= {
            "input_ids": [token for row in one.rows for token in row.request.tokens[row.start : row.end]],
            "positions": [position for row in one.rows for position in range(row.start, row.end)],
            "extend_seq_lens": None if mode == DECODE else [row.end - row.start for row in one.rows],
            "forward_mode": mode,
            "topk_ids_of_layer": choices,
            "misc_objects": [],
            "rids": [row.request.rid for row in one.rows],  # in the order of the tokens
        }


def forward_mode(rows: Sequence[PassRow]) -> int:
    """SGLang's number for a pass that extends prompts, decodes, or does both."""
    # After a retraction, a request's output is recomputed in chunks, which counts as extend.
    decoding = [row.end - row.start == 1 and row.start >= row.request.prompt_len for row in rows]
    return DECODE if all(decoding) else MIXED if any(decoding) else EXTEND


def records_for(mode: str, depth: int, experts: int, limit: int, entries: int) -> Records:
    """Empty records of a mode."""
    if mode == "per_pass":
        return PassRecords(depth, experts, limit)
    if mode == "per_token":
        return TokenRecords(depth, experts, limit)
    return StatRecords(depth, experts, limit, entries)
