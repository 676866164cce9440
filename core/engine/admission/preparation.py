"""Requests whose stages prepare something in a thread before they are admitted (``Stage.before_admit``)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from trunkline.core.engine.contracts import CheckedStage
from trunkline.core.engine.lane import Lane
from trunkline.core.engine.messages import Submit
from trunkline.core.types import Request


@dataclass(slots=True, eq=False)
class Preparation:
    """A request that waits for ``future``; ``message`` is what it was made of."""

    lane: Lane
    stage: CheckedStage
    request: Request
    message: Submit
    future: Future[Any]

    @property
    def outdated(self) -> bool:
        """Whether the lane has other weights by now, and so another stage."""
        return self.lane.stages.get(self.request.task) is not self.stage


class Preparations:
    """The preparations of all lanes. Only the loop's thread may call it, but for :meth:`count`."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """``wake`` is called, in any thread, when a preparation has ended."""
        self._wake = wake
        self._pending: dict[int, Preparation] = {}  # by the request's key
        self._ended: SimpleQueue[Preparation] = SimpleQueue()

    def start(self, lane: Lane, request: Request, message: Submit) -> bool:
        """Start what the request's stage has to prepare. False if that is nothing. PluginError, RequestError."""
        stage = lane.stages.get(request.task)
        future = None if stage is None else stage.before_admit(request)
        if stage is None or future is None:
            return False
        preparation = Preparation(lane, stage, request, message, future)
        self._pending[request.key] = preparation

        def end(_: Future[Any]) -> None:
            self._ended.put(preparation)
            self._wake()

        future.add_done_callback(end)
        return True

    def cancel(self, key: int) -> None:
        """The request was aborted. Does nothing if it isn't being prepared."""
        preparation = self._pending.pop(key, None)
        if preparation is not None:
            preparation.future.cancel()

    def take_ended(self) -> list[Preparation]:
        """The preparations that have ended since the last call, but for those of cancelled requests."""
        ended = []
        try:
            while True:
                preparation = self._ended.get_nowait()
                if self._pending.get(preparation.request.key) is preparation:
                    del self._pending[preparation.request.key]
                    ended.append(preparation)
        except Empty:
            return ended

    def count(self, lane: Lane) -> int:
        """The number of requests of the lane that are being prepared. May be called from any thread."""
        return sum(preparation.lane is lane for preparation in list(self._pending.values()))
