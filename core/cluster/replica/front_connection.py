"""``FrontConnection``: a replica's end of the connection to a front."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from trunkline.core.cluster.connection import Connection
from trunkline.core.cluster.files import ReceivedFile
from trunkline.core.cluster.messages import State, ToReplica, decode_for_replica
from trunkline.core.engine.messages import Heartbeat

log = logging.getLogger("trunkline.cluster")

CONNECT_SECONDS = 30.0  # in which a front must use its ticket, and show it


class FrontConnection(Connection):
    """A front, and what it runs.

    ``accepted``: it has shown a ticket. ``keys``: the engine's keys of what it runs, by the front's. ``files``: copies
    of files that its calls name. ``state``, ``beat``: the last ones sent.
    """

    limit = 1024  # bytes of a frame, until it is accepted

    def __init__(
        self,
        receive: Callable[[FrontConnection, list[ToReplica]], None],
        drop: Callable[[FrontConnection], None],
    ) -> None:
        """``receive`` gets its messages; ``drop`` is called when it is gone."""
        super().__init__(decode_for_replica, lambda messages: receive(self, messages))
        self.accepted = False
        self.keys: dict[int, int] = {}
        self.files: dict[int, ReceivedFile] = {}
        self.state: State | None = None
        self.beat: Heartbeat | None = None
        self._drop = drop
        asyncio.get_running_loop().call_later(CONNECT_SECONDS, self._check_accepted)

    def receive(self, body: bytes) -> None:
        try:
            super().receive(body)
        except Exception:
            if self.accepted:
                raise
            log.warning("a connection without a valid ticket was ended")  # one line: anyone can make such connections
            self.abort()

    def accept(self) -> None:
        self.accepted, self.limit = True, Connection.limit

    @property
    def live(self) -> list[int]:
        """The front's keys of what runs, or waits for a file."""
        return [*self.keys, *(key for key in self.files if key not in self.keys)]

    def forget(self, key: int) -> int | None:
        """A request or call of the front has ended: the engine's key, if the engine had it."""
        if (file := self.files.pop(key, None)) is not None:
            file.close()
        return self.keys.pop(key, None)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._drop(self)

    def _check_accepted(self) -> None:
        if not self.accepted:
            self.abort()
