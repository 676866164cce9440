"""What changes among the arguments of recorded launches when they run on some rows of other tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit

from trunkline.kernels.cpu.threads import OPTIONS, Kernel, int64s

_ROWS, _CLAIMED = -1, -2  # in place of an input's number: the number of rows, and the counter of claimed units


Launches = Sequence[tuple[Kernel, bytes]]
"""Kernels with their records of arguments."""


def changes_of(launches: Launches, inputs: Sequence[tuple[torch.Tensor, int]]) -> list[tuple[int, int, int, int]]:
    """For each argument that changes: its place among those of all launches, the number of the input in which it is an
    address, bytes from row to row of that, and from its start.

    ``inputs``: tensors, and bytes from row to row. An input's number may be a constant of this module instead.
    """
    arguments, found = joined(launches), []
    for place, name in enumerate(name for task, _ in launches for name in task.fields):
        if name in ("rows", "claimed"):
            found.append((place, _ROWS if name == "rows" else _CLAIMED, 0, 0))
    for number, (tensor, row) in enumerate(inputs):
        for place in places_in(arguments, tensor):
            found.append((place, number, row, int(arguments[place]) - tensor.data_ptr()))
    return found


def joined(launches: Launches) -> np.ndarray:
    """The arguments of all launches, one after another: int64."""
    return np.frombuffer(b"".join(block for _, block in launches), np.int64)


def places_in(arguments: np.ndarray, tensor: torch.Tensor) -> list[int]:
    """Where ``arguments`` has addresses in ``tensor``.

    An argument is one if its value is: no count is that large, and the bits of a float are a larger number, or 0.
    """
    start = tensor.data_ptr()
    return [int(place) for place in np.flatnonzero((arguments >= start) & (arguments < start + tensor.nbytes))]


def _write_changes(arguments: int, changes: int, count: int, starts: int, first: int, rows: int) -> None:
    """Write ``count`` changes into ``arguments``, for ``rows`` rows from ``first`` on; all others are addresses.

    ``starts``: the address of each input.
    """
    written, each, inputs = int64s(arguments), int64s(changes), int64s(starts)
    for i in range(count):
        source = each[4 * i + 1]
        if source == _ROWS:
            value = np.int64(rows)
        elif source == _CLAIMED:
            value = np.int64(0)
        else:
            value = inputs[source] + first * each[4 * i + 2] + each[4 * i + 3]
        written[each[4 * i]] = value


write_changes: Any = njit(**OPTIONS)(_write_changes)
