"""The state of the server between its start and its end: warm, healthy, draining."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Lifecycle:
    """Where the server stands between its start and its end."""

    warm: bool = True  # the first request to oneself was answered
    draining: bool = False  # on its way out
    healthy: Callable[[], bool] = field(default=lambda: True)  # of the engine
    results: Callable[[], int] = field(default=lambda: 0)  # results that the engine has sent so far

    @property
    def ready(self) -> bool:
        return self.warm and not self.draining and self.healthy()
