"""How the rows of a forward pass lie in memory; every attention kernel reads this."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(slots=True)
class Layout:
    """Rows packed one after another along the token axis ``[T]``.

    Row ``r`` has queries ``[q_start[r], q_start[r + 1])`` and attends to ``kv_len[r]`` keys, its
    own new ones last. Key ``j`` of row ``r`` lies in pool slot ``table[table_row[r], j]``.
    The first ``decodes`` rows are decoding: one query each, of a token that was generated. Without a
    pool (encoders, warm-up), ``kv_len[r]`` equals the row's number of queries and ``table`` is unused.
    """

    q_start: np.ndarray  # int32 [R + 1]
    kv_len: np.ndarray  # int32 [R]
    table_row: np.ndarray  # int32 [R]
    table: np.ndarray  # int32 [rows, max_len], owned by the scheduler
    out_slots: torch.Tensor  # int64 [T], where the new tokens' keys and values go
    decodes: int
    # The backend's note, made at a pass's first layer that needs it and gone with the pass.
    split: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.kv_len)
