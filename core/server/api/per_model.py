"""Values that a plugin's service computes once for each served model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from trunkline.core.types import ServedModel

T = TypeVar("T")


class PerModel(Generic[T]):
    """``make(served)`` of each model, computed at the first use, and again after a weight update."""

    def __init__(self, make: Callable[[ServedModel], T]) -> None:
        self._make = make
        self._known: dict[str, tuple[ServedModel, T]] = {}

    def get(self, served: ServedModel) -> T:
        """The model's value. Raises what ``make`` raises."""
        known = self._known.get(served.name)
        if known is None or known[0] is not served:  # a weight update makes a new ServedModel
            for former in served.aliases:
                self._known.pop(former, None)
            known = self._known[served.name] = served, self._make(served)
        return known[1]
