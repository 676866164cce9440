"""The state of the server, as health routes report it: warm, healthy, draining."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Lifecycle:
    """The state of the server."""

    warm: bool = True  # the warm-up requests were answered
    draining: bool = False  # it is shutting down
    healthy: Callable[[], bool] = field(default=lambda: True)  # whether the engine is healthy
    results: Callable[[], int] = field(default=lambda: 0)  # number of results that the engine has sent so far

    @property
    def ready(self) -> bool:
        return self.warm and not self.draining and self.healthy()
