"""Calls to plugins' code in the client: a failure is logged with the plugin's name and ends no request."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from trunkline.core.discovery import Provided
from trunkline.core.errors import describe_error
from trunkline.core.types import Reply, RequestObserver

log = logging.getLogger("trunkline.request")


class Failures:
    """Counts exceptions of plugins' observers and collectors: ``counts[plugin, method]``."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, provided: Provided[Any], method: str, error: BaseException) -> None:
        """Count a failure; the first one of each method is logged."""
        name = f"{type(provided.value).__name__}.{method}"
        key = (provided.plugin.name, name)
        self.counts[key] += 1
        if self.counts[key] == 1:
            message = f"{name} raised {describe_error(error)}; further failures of it are only counted"
            log.error("%s", provided.failed(message), exc_info=error)


class CheckedObservers:
    """The request observers of a client: for each method of RequestObserver, the functions to call."""

    def __init__(self, provided: Iterable[Provided[RequestObserver]] = (), failures: Failures | None = None) -> None:
        """PluginError for an observer with a method that is a coroutine function."""
        observers, failures = tuple(provided), failures or Failures()
        self.submitted: tuple[Callable[[Reply], None], ...] = _calls(observers, "submitted", failures)
        self.started: tuple[Callable[[Reply], None], ...] = _calls(observers, "started", failures)
        self.progressed: tuple[Callable[[Reply, int], None], ...] = _calls(observers, "progressed", failures)
        self.ended: tuple[Callable[[Reply], None], ...] = _calls(observers, "ended", failures)


def _calls(
    observers: Iterable[Provided[RequestObserver]], method: str, failures: Failures
) -> tuple[Callable[..., None], ...]:
    inherited = getattr(RequestObserver, method)
    overriding = (one for one in observers if getattr(type(one.value), method) is not inherited)
    return tuple(_guarded(one, method, failures) for one in overriding)


def _guarded(provided: Provided[RequestObserver], method: str, failures: Failures) -> Callable[..., None]:
    function = getattr(provided.value, method)
    if inspect.iscoroutinefunction(function):
        raise provided.failed(f"{type(provided.value).__name__}.{method} must be a plain function, not async")

    def call(*arguments: Any) -> None:
        try:
            function(*arguments)
        except BaseException as error:  # SystemExit would end the event loop
            failures.add(provided, method, error)

    return call
