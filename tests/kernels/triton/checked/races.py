"""Accesses to the same bytes by several programs of one launch, or by several lanes of one store.

All accesses are recorded and compared when the launch ends, so that the order of the programs doesn't matter. Atomic
operations don't race with each other, but they don't order plain accesses either: a kernel whose last program reads
what the others wrote needs ``races=False``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import KernelBug
from .floats import Array

_NONE = np.zeros(0, np.uint64), np.zeros(0, np.int32)


class AccessLog:
    """Plain and atomic accesses of one launch by program."""

    def __init__(self) -> None:
        self._log: dict[str, list[tuple[Array, int, int]]] = {"load": [], "store": [], "atomic": []}

    def add(self, kind: str, addresses: Array, size: int, program: int) -> None:
        """``addresses`` (uint64) of accesses of ``size`` bytes each."""
        if addresses.size:
            self._log[kind].append((addresses, size, program))

    def check(self, place: Callable[[int], str]) -> None:
        """Raise KernelBug for two programs that access the same bytes, one of which writes."""
        sizes = {size for entries in self._log.values() for _, size, _ in entries}
        if not self._log["store"] and not self._log["atomic"]:
            return
        grain = min(sizes)
        loads = self._grains("load", grain)
        stores, atomics = (_distinct(*self._grains(kind, grain)) for kind in ("store", "atomic"))
        addresses, programs = stores
        twice = np.flatnonzero((addresses[1:] == addresses[:-1]) & (programs[1:] != programs[:-1]))
        if twice.size:
            at = int(twice[0])
            self._fail(place, int(addresses[at]), int(programs[at]), "stores", int(programs[at + 1]), "stores")
        self._compare(place, stores, "stores", loads, "loads")
        self._compare(place, stores, "stores", atomics, "updates")
        self._compare(place, atomics, "updates", loads, "loads")

    def _grains(self, kind: str, grain: int) -> tuple[Array, Array]:
        """(addresses, programs); an access of several grains is several entries."""
        parts = [
            (addresses if size == grain else _split(addresses, size, grain), program)
            for addresses, size, program in self._log[kind]
        ]
        if not parts:
            return _NONE
        addresses = np.concatenate([part for part, _ in parts])
        return addresses, np.concatenate([np.full(part.size, program, np.int32) for part, program in parts])

    def _compare(
        self, place: Callable[[int], str], one: tuple[Array, Array], doing: str, other: tuple[Array, Array], does: str
    ) -> None:
        """Fail when an address in both has an access of ``other`` by another program than one of ``one``.

        ``one`` is sorted and distinct.
        """
        if not one[0].size or not other[0].size:
            return
        first = np.searchsorted(one[0], other[0], "left")
        last = np.searchsorted(one[0], other[0], "right")
        found = first < last
        index = np.minimum(first, one[0].size - 1)
        # Several programs of ``one`` at an address (atomics): at least one of them is another program.
        bad = np.flatnonzero(found & ((last - first > 1) | (one[1][index] != other[1])))
        if bad.size:
            at = int(bad[0])
            candidates = one[1][first[at] : last[at]]
            writer = int(candidates[candidates != other[1][at]][0])
            self._fail(place, int(other[0][at]), writer, doing, int(other[1][at]), does)

    @staticmethod
    def _fail(place: Callable[[int], str], address: int, one: int, doing: str, other: int, does: str) -> None:
        raise KernelBug("race", f"program {one} {doing} and program {other} {does} {place(address)}")


def _split(addresses: Array, size: int, grain: int) -> Array:
    return (addresses[:, None] + np.arange(0, size, grain, dtype=np.uint64)).ravel()


def _distinct(addresses: Array, programs: Array) -> tuple[Array, Array]:
    """The distinct pairs, sorted by address, then by program."""
    order = np.lexsort((programs, addresses))
    addresses, programs = addresses[order], programs[order]
    new = np.ones(addresses.size, bool)
    new[1:] = (addresses[1:] != addresses[:-1]) | (programs[1:] != programs[:-1])
    return addresses[new], programs[new]


def check_lanes(addresses: Array, values: Array) -> None:
    """Raise KernelBug when one store writes different values to one address: which one remains is undefined."""
    order = np.argsort(addresses, kind="stable")
    addresses, values = addresses[order], values[order]
    different = (addresses[1:] == addresses[:-1]) & (values[1:] != values[:-1])
    if different.any():
        raise KernelBug("race", f"lanes of one store write different values to {int(addresses[:-1][different][0]):#x}")
