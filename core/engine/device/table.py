"""The slot table where kernels read it: on the device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from trunkline.core.cache.pool import SlotTable

from .base import Device

ROWS, POSITIONS, SLOTS = "table.rows", "table.positions", "table.slots"
WIDTH = 4096  # entries; compiled kernels depend on the width of a row, which must not follow the free memory


class DeviceTable:
    """A copy of a slot table on the device: the entries that have changed are uploaded with each pass.

    It has one row more than the table, for rows that only fill up a CUDA graph; its first entry is ``unused_slot``. Its
    rows are longer than needed, a multiple of ``WIDTH``. On a device that shares the host's memory, ``tensor`` is the
    table itself.
    """

    def __init__(self, table: SlotTable, device: Device, unused_slot: int | None) -> None:
        """For a table that isn't in use yet. ``unused_slot`` None: there is no KV pool, so that no kernel reads it."""
        self.host = table
        self.unused_row = len(table.slots)
        self._shared = device.shares_memory or unused_slot is None
        if device.shares_memory:
            self.tensor = torch.from_numpy(table.slots)
            return
        if unused_slot is None:
            self.tensor = torch.zeros(1, 1, dtype=torch.int32, device=device.kind)
            return
        table.changes()  # notes them from now on
        self._changed = [np.empty(0, np.int64)] * 2  # rows and positions that may not be on the device yet
        width = -(-table.max_len // WIDTH) * WIDTH
        self.tensor = torch.zeros(self.unused_row + 1, width, dtype=torch.int32, device=device.kind)
        self.tensor[self.unused_row, 0] = unused_slot

    def changes(self) -> dict[str, np.ndarray]:
        """The arrays to be uploaded with the next pass; none if nothing has changed."""
        if self._shared:
            return {}
        self._changed = [np.concatenate(sides) for sides in zip(self._changed, self.host.changes(), strict=True)]
        rows, positions = self._changed
        if not len(rows):
            return {}
        return {ROWS: rows, POSITIONS: positions, SLOTS: self.host.slots[rows, positions]}

    def update(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Apply the uploaded changes, before the pass that they were uploaded with."""
        if ROWS in inputs:
            self.tensor[inputs[ROWS], inputs[POSITIONS]] = inputs[SLOTS]
            self._changed = [np.empty(0, np.int64)] * 2
