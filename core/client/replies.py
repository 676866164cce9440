"""The reply to one submitted request: its id, its state so far, and its line in the log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextvars import ContextVar
from typing import Any

import msgspec

from trunkline.core.engine.messages import Progress, Started
from trunkline.core.errors import EngineDown, RequestError

from .contracts import CheckedObservers

log = logging.getLogger("trunkline.request")

response_id: ContextVar[str | None] = ContextVar("response_id", default=None)
"""Request id for the ``X-Request-Id`` of the HTTP exchange that this task is answering."""

ABORTED: dict[str, Any] = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
ABORTED_WAITING: dict[str, Any] = {**ABORTED, "message": "Abort in waiting queue"}
UNOBSERVED = CheckedObservers()


class EngineReply:
    """Implements :class:`trunkline.core.types.Reply` for a request that the engine has.

    The engine's messages are folded in as they come and never wait for whoever reads: a slow
    reader finds several steps at once, and the state is one list of tokens however slow it is.
    """

    def __init__(
        self,
        key: int,
        model: str,
        task: str,
        rid: str,
        prompt_tokens: int,
        drop: Callable[[EngineReply], None],
        *,
        model_label: str = "",
        observers: CheckedObservers = UNOBSERVED,
    ) -> None:
        """``model_label``: the model's first name, if it was renamed since."""
        self.key = key
        self.model = model
        self.model_label = model_label or model
        self.task = task
        self.rid = rid
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.weight_version = ""
        self.versions: list[tuple[str, int]] = []
        self.tokens: list[int] = []
        self.results: list[Any] = []
        self.finish: dict[str, Any] | None = None
        self.error: RequestError | None = None
        self.created = time.perf_counter()
        self.started = 0.0  # left the waiting queue, 0 = hasn't
        self.first = 0.0  # first message with results
        self.latest = 0.0  # latest message with results
        self.finished = 0.0
        self._drop = drop
        self._observers = observers
        self._news = asyncio.Event()
        self._over = asyncio.Event()

    @property
    def over(self) -> bool:
        return self.finish is not None or self.error is not None

    @property
    def data(self) -> Any:
        return self.results[-1] if self.results else None

    # -- the consumer's side -----------------------------------------------------------------

    async def wait(self) -> None:
        """Return when something arrived since the last call, or at once when it is over."""
        if not self.over:
            await self._news.wait()
        self._news.clear()

    async def result(self) -> None:
        """Return when it is over; raise ``error`` if it has one."""
        await self._over.wait()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        """Abort in the engine and free everything; harmless when it is over."""
        if not self.over:
            self._drop(self)
            self.abort()

    def drop(self, error: RequestError) -> None:
        """The same for another reason than the caller's wish."""
        if not self.over:
            self._drop(self)
            self.fail(error)

    # -- the engine's side -------------------------------------------------------------------

    def start(self, message: Started, weight_version: str) -> None:
        self.weight_version = weight_version
        self.started = time.perf_counter()
        self.cached_tokens = message.cached
        for started in self._observers.started:
            started(self)

    def relabel(self, weight_version: str) -> None:
        """The model's weights, or their label, may have changed; later tokens are of this one."""
        if not self.started or not weight_version or weight_version == self.weight_version:
            return
        count = len(self.tokens)
        if count > (self.versions[-1][1] if self.versions else 0):  # else none was made with the present label
            self.versions.append((self.weight_version, count))
        self.weight_version = weight_version
        if self.versions and self.versions[-1] == (weight_version, count):
            self.versions.pop()  # back to what they were, with no token between

    def update(self, message: Progress) -> None:
        """Fold in a message. A last message without result leaves what is there."""
        if message.tokens or message.data is not None:
            observers = self._observers.progressed
            for progressed in observers:
                progressed(self, len(message.tokens))
            if observers and self.over:
                return  # one of them has cancelled it
            self.latest = time.perf_counter()
            self.first = self.first or self.latest
        self.tokens += message.tokens
        if message.data is not None:
            self.results.append(msgspec.msgpack.decode(message.data))
        self.cached_tokens = message.cached
        if message.error is not None:
            self.fail(as_error(message.error))
        elif message.finish is not None:
            self.end(message.finish)
        else:
            self._news.set()

    def abort(self) -> None:
        """End it with the finish reason of an abort; the partial output stays."""
        self.end(ABORTED if self.started else ABORTED_WAITING)

    def end(self, finish: dict[str, Any]) -> None:
        self.finish = finish
        self._close()

    def fail(self, error: RequestError) -> None:
        self.error = error
        self._close()

    def _close(self) -> None:
        self.finished = time.perf_counter()
        self._news.set()
        self._over.set()
        for ended in self._observers.ended:
            ended(self)
        if log.isEnabledFor(logging.INFO):
            log.info(self.describe())

    def describe(self) -> str:
        """One log line in ``key=value`` form: identity, sizes, times in ms, outcome; never text."""
        started = self.started or self.finished
        first = self.first or self.finished
        outcome = f"error:{self.error.status}" if self.error else (self.finish or {}).get("type", "running")
        return (
            f"rid={printable(self.rid)} model={printable(self.model)} task={self.task} "
            f"prompt={self.prompt_tokens} cached={self.cached_tokens} output={len(self.tokens)} "
            f"queue_ms={_ms(started - self.created)} prefill_ms={_ms(first - started)} "
            f"decode_ms={_ms(self.finished - first)} finish={outcome}"
        )


def check_rids(rids: Sequence[str], live: Collection[str] = ()) -> None:
    """RequestError for ids that occur twice in a request, or that one of the ``live`` requests has.

    Each id stands for one live sequence, or aborting by id would hit another client's.
    """
    if len(set(rids)) < len(rids):
        repeated = sorted(rid for rid, count in Counter(rids).items() if count > 1)
        raise RequestError(f"Duplicate request IDs detected within the request: {repeated}", param="rid")
    for rid in rids:
        if rid in live:
            raise RequestError(f"Duplicate request ID detected: {rid}", param="rid")


def as_error(wire: tuple[int, str, str | None]) -> RequestError:
    """An error as the engine sends it: status, message, field."""
    status, message, param = wire
    return RequestError(message, status=status, param=param, retry_after=1.0 if status == 503 else None)


def engine_down(reason: str) -> EngineDown:
    """What the client of an unanswered request is told when the engine is gone."""
    return EngineDown(f"The engine stopped before this request was done ({reason}); it may be sent again.")


def printable(text: str, limit: int = 128) -> str:
    """A client's string made fit for a header or a log line: visible ASCII without spaces."""
    safe = "".join(char if "!" <= char <= "~" else "?" for char in text[:limit])
    return safe or "-"


def _ms(seconds: float) -> str:
    return f"{max(0.0, seconds) * 1e3:.1f}"
