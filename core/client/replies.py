"""``EngineReply``: the state of a submitted request in the front, and its log line."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextvars import ContextVar
from typing import Any

import msgspec

from trunkline.core.engine.messages import ABORTED, ABORTED_WAITING, Progress, Started
from trunkline.core.errors import EngineDown, RequestError
from trunkline.core.types import all_results

from .contracts import CheckedObservers

log = logging.getLogger("trunkline.request")

response_id: ContextVar[str | None] = ContextVar("response_id", default=None)
"""Request id for the header ``X-Request-Id`` of the HTTP response that this asyncio task makes."""

NO_OBSERVERS = CheckedObservers()


class EngineReply:
    """Implements :class:`trunkline.core.types.Reply`: the client applies the engine's messages to it as they arrive.

    Exactly one of ``finish`` and ``error`` is set when the request ends.
    """

    def __init__(
        self,
        key: int,
        model: str,
        task: str,
        rid: str,
        prompt_tokens: int,
        abort_in_engine: Callable[[EngineReply], None],
        *,
        model_label: str = "",
        observers: CheckedObservers = NO_OBSERVERS,
    ) -> None:
        """``model_label``: the model's first name, if weight updates have renamed it.

        ``abort_in_engine``: removes the request from the client, and aborts it in the engine.
        """
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
        self.started = 0.0  # left the waiting queue
        self.first = 0.0  # first message with results
        self.latest = 0.0  # latest message with results
        self.finished = 0.0
        self._abort_in_engine = abort_in_engine
        self._observers = observers
        self._updated = asyncio.Event()
        self._begun = asyncio.Event()
        self._ended = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether ``finish`` or ``error`` is set."""
        return self.finish is not None or self.error is not None

    @property
    def data(self) -> Any:
        return self.results[-1] if self.results else None

    # -- for readers, see trunkline.core.types.Reply -----------------------------------------

    async def wait(self) -> None:
        if not self.ended:
            await self._updated.wait()
        self._updated.clear()

    async def begun(self) -> None:
        await self._begun.wait()

    async def result(self) -> None:
        await self._ended.wait()
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        if not self.ended:
            self._abort_in_engine(self)
            self.abort()

    # -- for the client and its parts --------------------------------------------------------

    def cancel_with(self, error: RequestError) -> None:
        """Abort the request in the engine, and end it with an error. Does nothing when it has ended."""
        if not self.ended:
            self._abort_in_engine(self)
            self.fail(error)

    def start(self, message: Started, weight_version: str) -> None:
        """The request has left the waiting queue; it runs with the weights of this label."""
        self.weight_version = weight_version
        self.started = time.perf_counter()
        self.cached_tokens = message.cached
        self._begun.set()
        for started in self._observers.started:
            started(self)

    def relabel(self, weight_version: str) -> None:
        """Set the label of the weights that compute later tokens. Does nothing when it hasn't changed."""
        if not self.started or not weight_version or weight_version == self.weight_version:
            return
        count = len(self.tokens)
        if count > (self.versions[-1][1] if self.versions else 0):  # else no token was computed with the current label
            self.versions.append((self.weight_version, count))
        self.weight_version = weight_version
        if self.versions and self.versions[-1] == (weight_version, count):
            self.versions.pop()  # the label of the last entry again, and no token in between

    def apply(self, message: Progress) -> None:
        """Add the message's tokens and result, and end if it is the last one."""
        if message.tokens or message.data is not None:
            observers = self._observers.progressed
            for progressed in observers:
                progressed(self, len(message.tokens))
            if observers and self.ended:
                return  # an observer has cancelled it
            self.latest = time.perf_counter()
            self.first = self.first or self.latest
        self.tokens += message.tokens
        if message.data is not None:
            self.results.append(msgspec.msgpack.decode(message.data))
        self.cached_tokens = message.cached
        if message.error is not None:
            self.fail(error_from_wire(message.error))
        elif message.finish is not None:
            self.end(message.finish)
        else:
            self._updated.set()

    def abort(self) -> None:
        """End with the finish reason of an abort. The output so far is kept."""
        self.end(ABORTED if self.started else ABORTED_WAITING)

    def end(self, finish: dict[str, Any]) -> None:
        self.finish = finish
        self._close()

    def fail(self, error: RequestError) -> None:
        self.error = error
        self._close()

    def _close(self) -> None:
        self.finished = time.perf_counter()
        self._updated.set()
        self._begun.set()
        self._ended.set()
        for ended in self._observers.ended:
            ended(self)
        if log.isEnabledFor(logging.INFO):
            log.info(self.describe())

    def describe(self) -> str:
        """A log line of ``key=value`` pairs: ids, token counts, times in ms, outcome; never text of the request."""
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
    """RequestError for ids that occur twice in ``rids``, or that one of the ``live`` requests has.

    Ids of live sequences are unique; otherwise an abort by id would abort another client's request.
    """
    if len(set(rids)) < len(rids):
        repeated = sorted(rid for rid, count in Counter(rids).items() if count > 1)
        raise RequestError(f"Duplicate request IDs detected within the request: {repeated}", param="rid")
    for rid in rids:
        if rid in live:
            raise RequestError(f"Duplicate request ID detected: {rid}", param="rid")


def error_from_wire(wire: tuple[int, str, str | None]) -> RequestError:
    """The error of a message from the engine; see :func:`trunkline.core.engine.messages.as_wire`."""
    status, message, param = wire
    return RequestError(message, status=status, param=param, retry_after=1.0 if status == 503 else None)


async def first_answer(answers: Iterable[Awaitable[Any]]) -> Any:
    """The first replica's answer to a call when all have answered. Raises the first error, if there is one."""
    return (await all_results(answers))[0]


def engine_down(reason: str) -> EngineDown:
    """The error of requests in flight when the engine process is lost."""
    return EngineDown(f"The engine stopped before this request was done ({reason}); it may be sent again.")


def printable(text: str, limit: int = 128) -> str:
    """A client's string for a header or a log line: the first ``limit`` characters, ``?`` for all but visible ASCII."""
    safe = "".join(char if "!" <= char <= "~" else "?" for char in text[:limit])
    return safe or "-"


def _ms(seconds: float) -> str:
    return f"{max(0.0, seconds) * 1e3:.1f}"
