"""Everything but the tasks: plugin host, scheduler, cache, models, HTTP; imports kernels, no plugin, names no task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    """``Engine`` is imported on first use: it brings torch with it."""
    if name == "Engine":
        from .client.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
