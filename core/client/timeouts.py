"""``Timeouts``: ends requests that exceed ``--queue-timeout`` or ``--request-timeout``."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping

from trunkline.core.errors import RequestError
from trunkline.core.settings import ServerSettings

from .replies import EngineReply, printable

log = logging.getLogger("trunkline.request")

SWEEP_SECONDS = 0.25  # interval between checks
# SGLang's texts, which clients compare; the log names the setting.
WAITED_TOO_LONG = "Request waiting timeout reached."
RAN_TOO_LONG = "Request running timeout reached."


class Timeouts:
    """Checks all requests a few times per second, unless the settings have no limit."""

    def __init__(
        self, limits: ServerSettings, live: Mapping[int, EngineReply], waiting: Mapping[int, EngineReply]
    ) -> None:
        self._limits = limits
        self._live = live
        self._waiting = waiting
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._limits.queue_timeout or self._limits.request_timeout:
            self._task = asyncio.create_task(self._sweep(), name="request timeouts")

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _sweep(self) -> None:
        limits = self._limits
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            _expire(self._waiting, limits.queue_timeout, WAITED_TOO_LONG, "--queue-timeout", 1.0)
            _expire(self._live, limits.request_timeout, RAN_TOO_LONG, "--request-timeout", None)


def _expire(
    table: Mapping[int, EngineReply], limit: float | None, message: str, flag: str, retry_after: float | None
) -> None:
    if limit is None:
        return
    deadline = time.perf_counter() - limit
    for reply in [reply for reply in table.values() if reply.created < deadline]:
        log.warning("rid=%s is aborted after %g s (%s)", printable(reply.rid), limit, flag)
        reply.cancel_with(RequestError(message, status=503, retry_after=retry_after))
