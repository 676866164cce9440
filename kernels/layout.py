"""The memory layout of one forward pass: packed rows, slot table, KV pool. Every attention kernel reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


class LayoutTensors(NamedTuple):
    """:class:`Layout`'s arrays of the same names, int32, on the device where keys and values are.

    A kernel that reads only these, and takes nothing but the number of rows from the arrays, can be part of a CUDA
    graph: it is replayed with other values in the tensors.
    """

    q_start: torch.Tensor
    kv_len: torch.Tensor
    table_row: torch.Tensor
    table: torch.Tensor


class KVSlots(NamedTuple):
    """Where new keys and values are written: one layer of the KV pool, and the slot of each token.

    ``keys`` [slots, KV, D] and ``values`` [slots, KV, Dv] are contiguous, ``out_slots`` int64 [T].
    """

    keys: torch.Tensor
    values: torch.Tensor
    out_slots: torch.Tensor


@dataclass(slots=True)
class Layout:
    """The rows of a pass, packed one after another along the token axis ``[T]``, without padding.

    Row ``r`` computes the tokens ``[q_start[r], q_start[r + 1])`` of that axis. They attend to the row's
    ``kv_len[r]`` keys: the cached prefix, then the new tokens. Key and value ``j`` of row ``r`` are in
    slot ``table[table_row[r], j]`` of the KV pool. Example: request A decodes its token 5; B extends a
    cached prefix of 4 tokens by 3; C computes a prompt of 2 tokens::

        row r                0       1               2
        packed axis        | a5    | b4   b5   b6  | c0   c1  |    T = 6: ids, positions, q, k, v, hidden rows
        q_start              0       1               4          6
        kv_len               6       7               2             decodes = 1 (row 0)
        table_row            2       0               1
        out_slots            12      14   13   15    2    10       slots of the new tokens

                      position   0   1   2   3   4   5   6
        table[0]   row 1, B      4   5   6   7 |14  13  15         cached prefix | new
        table[1]   row 2, C    | 2  10                             only new
        table[2]   row 0, A      8   3   9   0   1 |12

        slot of the pool     0   1   2   3   4   5   6   7   8   9  10  11  12  13  14  15
        keys[slot], values  a3  a4  c0  a1  b0  b1  b2  b3  a0  a2  c1   -  a5  b5  b4  b6

    Each layer has its own ``keys`` [slots, KV, D] and ``values`` [slots, KV, Dv]; slot numbers hold for
    all layers. Slots of one row need not be neighbours, and several rows may read the same slots of a
    shared prefix.

    The first ``decodes`` rows are decoding: one query each, of a token that was generated. Without a
    pool (encoders, warm-up), ``kv_len[r]`` is the row's number of new tokens, and ``table`` and
    ``out_slots`` are unused.
    """

    q_start: np.ndarray  # int32 [R + 1]
    kv_len: np.ndarray  # int32 [R]
    table_row: np.ndarray  # int32 [R]
    table: np.ndarray  # int32 [table rows, max_len]: the slot table, owned by the scheduler
    out_slots: torch.Tensor  # int64 [T]: the slots to which the new tokens' keys and values are written
    decodes: int
    tensors: LayoutTensors | None = None  # see :meth:`on`
    bounds: bool = False  # kv_len has the largest lengths that are possible; the actual ones are in ``tensors`` only
    # Row numbers for decode and for extend, which the backend computes in the first layer for all of them.
    split: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.kv_len)

    def on(self, device: torch.device) -> LayoutTensors:
        """The arrays on ``device``. The engine uploads them with a pass's other inputs, and sets ``tensors``; else they
        are copied here, which waits for the device."""
        if self.tensors is None:
            arrays = (self.q_start, self.kv_len, self.table_row, self.table)
            self.tensors = LayoutTensors(*(torch.from_numpy(array).to(device) for array in arrays))
        return self.tensors
