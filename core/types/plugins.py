"""Limits on plugins' code that runs in the engine, and contributions of plugins to other plugins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from trunkline.core.errors import PluginError

MAX_FAILURES = 5
"""Failures in a row after which a task or an extension of one is switched off."""
SLOW_SECONDS = 0.1
"""A call that blocks the engine for longer is logged, once for each method."""


class Contribution(Protocol):
    """One item of the list that a plugin returned from another plugin's hook."""

    @property
    def value(self) -> Any:
        """The item."""

    def failed(self, message: str) -> PluginError:
        """The error for a failure of the item; it names its plugin and distribution."""


class Ask(Protocol):
    """Calls a hook that a plugin has specified (``trunkline_hookspecs``)."""

    def __call__(self, hook: str, /, **arguments: Any) -> Sequence[Contribution]:
        """Each item of the lists that plugins return. PluginError when one of them fails, TrunklineError for a
        hook that no plugin has specified."""
