"""Which replicas the deployments have, as Ray's routers in this process say it. Knows no Ray."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

_lock = threading.Lock()
_names: dict[Hashable, list[str]] = {}  # by deployment: its replicas
_watchers: dict[Hashable, Callable[[Sequence[str]], None]] = {}


class ReplicaGone(Exception):
    """The replica that a call names isn't there any more."""


def watch(deployment: Hashable, changed: Callable[[Sequence[str]], None]) -> None:
    """Call ``changed`` with the names of the deployment's replicas, now if they are known, and when they change.

    It is called from the router's thread, and must return at once.
    """
    with _lock:
        _watchers[deployment] = changed
        if (names := _names.get(deployment)) is not None:
            changed(names)


def tell(deployment: Hashable, names: list[str]) -> None:
    """The deployment has these replicas now."""
    with _lock:
        _names[deployment] = names
        if (changed := _watchers.get(deployment)) is not None:
            changed(names)
