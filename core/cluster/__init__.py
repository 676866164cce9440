"""Several engine replicas behind one front, on Ray Serve; only :mod:`.deployments` and its users import Ray."""

from __future__ import annotations

from typing import Any


def build(args: dict[str, Any]) -> Any:
    """The application for ``serve run trunkline.core.cluster:build model=MODEL replicas=2``; see docs/scaling.md."""
    from .deployments import application

    return application(args)
