"""Sessions: requests that continue earlier ones, whose tokens are put before their own.

They live in the front. A continued prompt is an ordinary prompt; the prefix cache saves computing it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from trunkline.core.errors import RequestError
from trunkline.core.types import Reply

from .body_schemas import SessionParams

log = logging.getLogger("trunkline.generation")

MAX_SESSIONS = 1024  # beyond it, the one that was idle for longest is closed
MAX_NODES = 1024  # requests that a session remembers
MAX_TOKENS = 1 << 25  # prompt and output tokens of all sessions, four bytes each
DEFAULT_IDLE = 3600.0  # seconds without a request after which a session is closed, unless it was opened with another
BUSY = "Streaming session already has an active request."
REAP_SECONDS = 1.0  # between two searches for sessions that were idle for too long


class Node:
    """A request of a session. Its output is the reply's until that is over, and kept without the reply then."""

    def __init__(self, rid: str, prompt: Sequence[int], reply: Reply, parent: Node | None) -> None:
        self.rid = rid
        self.parent = parent
        self.children: list[Node] = []
        self._prompt = array("i", prompt)
        self._output = array("i")
        self._reply: Reply | None = reply

    @property
    def finished(self) -> bool:
        reply = self._reply
        return reply is None or reply.finish is not None or reply.error is not None

    @property
    def size(self) -> int:
        """Tokens that are kept."""
        return len(self._prompt) + len(self._output)

    def context(self, params: SessionParams) -> list[int]:
        """The tokens that a request continues: prompt and output so far, as far as ``params`` want them."""
        tokens = self._prompt.tolist()
        if not params.drop_previous_output:
            tokens += self._output.tolist() if self._reply is None else self._reply.tokens
        return tokens[: params.offset] if params.offset else tokens

    def cancel(self) -> None:
        """Abort the request; harmless when it is over."""
        if self._reply is not None:
            self._reply.cancel()

    async def end(self) -> bool:
        """Wait for the reply's end and let go of it. False when it failed or was aborted."""
        reply = self._reply
        assert reply is not None
        with suppress(RequestError):
            await reply.result()
        self._output, self._reply = array("i", reply.tokens), None
        return reply.error is None and (reply.finish or {}).get("type") != "abort"

    def below(self) -> Iterator[Node]:
        """All nodes that continue this one, directly or not."""
        pending = list(self.children)
        while pending:
            node = pending.pop()
            pending += node.children
            yield node


class Session:
    """A tree of requests by their rids, or with ``streaming`` a chain of which only the last is remembered."""

    def __init__(self, name: str, *, streaming: bool = False, idle: float = DEFAULT_IDLE) -> None:
        self.name = name
        self.streaming = streaming
        self.idle = idle
        self.model = ""  # whose tokens these are; "" before the first request
        self.nodes: dict[str, Node] = {}  # by rid; of a streaming session the last that succeeded
        self.kept: set[Node] = set()  # all of the tree, also those whose rid a later request took
        self.tokens = 0  # that they have
        self.running = 0
        self.touched = time.monotonic()  # last beginning or end of a request

    def expired(self, now: float) -> bool:
        return not self.running and now - self.touched > self.idle

    def find(self, params: SessionParams) -> Node | None:
        """The request that one with ``params`` continues, None for a new root. RequestError in SGLang's words."""
        if self.streaming:
            return self._last(params)
        if params.rid is None:
            return None
        node = self.nodes.get(params.rid)
        if node is None:
            raise RequestError("Invalid request session id", param="session_params")
        if not (params.replace or node.finished):
            raise RequestError(
                "Session request is appending to a request that hasn't finished.", param="session_params"
            )
        return node

    def _last(self, params: SessionParams) -> Node | None:
        if self.running:
            raise RequestError(BUSY, param="session_params")
        for given, name in (
            (params.replace, "replace"),
            (params.drop_previous_output, "drop_previous_output"),
            (params.offset, "offset"),
        ):
            if given:
                raise RequestError(f"Streaming sessions do not support {name}.", param="session_params")
        return next(iter(self.nodes.values()), None)

    def add(self, node: Node, params: SessionParams) -> None:
        """Remember a request that has been submitted, after what it replaces is gone."""
        if params.replace and node.parent is not None:
            node.parent.cancel()
            self._remove(node.parent.below())
            node.parent.children.clear()
        elif params.replace:
            self._remove(list(self.kept))
        self.kept.add(node)
        self.tokens += node.size
        self.running += 1
        self.touched = time.monotonic()
        if not self.streaming:
            self.nodes[node.rid] = node
            if node.parent is not None:
                node.parent.children.append(node)

    async def follow(self, node: Node) -> None:
        """Wait until a request is over. A streaming session goes on from it, or from where it was if it failed."""
        before = node.size
        succeeded = await node.end()
        self.running -= 1
        self.touched = time.monotonic()
        if node not in self.kept:
            return
        self.tokens += node.size - before
        if self.streaming:
            node.parent = None
            self._remove([other for other in self.kept if (other is node) != succeeded])
            self.nodes = {other.rid: other for other in self.kept}

    def _remove(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            node.cancel()
            self.kept.remove(node)
            self.tokens -= node.size
            if self.nodes.get(node.rid) is node:
                del self.nodes[node.rid]


class Sessions:
    """The open sessions of a server."""

    def __init__(self) -> None:
        self._open: dict[str, Session] = {}
        self._reaped = 0.0
        self._watchers: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, name: str | None, *, streaming: bool = False, idle: float | None = None) -> str:
        """The name of a new session. RequestError when one of that name is open."""
        self._reap()
        name = uuid.uuid4().hex if name is None else name
        if name in self._open and not self._open[name].expired(time.monotonic()):
            raise RequestError("Failed to open the session. Check if a session with the same id is still open.")
        if len(self._open) >= MAX_SESSIONS and not self._drop_idle():
            raise RequestError(
                f"{MAX_SESSIONS} sessions are open, and requests run in all of them; close one, or try again later.",
                status=503,
                retry_after=1.0,
            )
        self._open[name] = Session(name, streaming=streaming, idle=DEFAULT_IDLE if idle is None else idle)
        return name

    def close(self, name: str) -> None:
        """Forget a session; its running requests go on. Harmless for one that isn't open."""
        self._open.pop(name, None)

    def get(self, name: str) -> Session:
        """The open session of this name, RequestError when there is none."""
        self._reap()
        session = self._open.get(name)
        if session is None or session.expired(time.monotonic()):
            raise RequestError(f"Invalid request: session id {name} does not exist", param="session_params")
        return session

    def make_room(self, tokens: int, own: Sequence[Session]) -> None:
        """Close idle sessions until so many tokens more may be kept. RequestError 503 when that isn't enough."""
        while sum(session.tokens for session in self._open.values()) + tokens > MAX_TOKENS:
            if not self._drop_idle(own):
                raise RequestError(
                    f"The open sessions hold as many tokens as they may ({MAX_TOKENS}); close one, or try again later.",
                    status=503,
                    retry_after=1.0,
                )

    def record(self, session: Session, params: SessionParams, node: Node) -> None:
        """A request of a session has been submitted: remember it, and its output when it is over."""
        session.add(node, params)
        watcher = asyncio.create_task(session.follow(node), name="session request")
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    def _drop_idle(self, own: Sequence[Session] = ()) -> bool:
        """Close the session that has been idle for longest, none of ``own``; False when requests run in all."""
        idle = [session for session in self._open.values() if not session.running and session not in own]
        if not idle:
            return False
        session = min(idle, key=lambda session: session.touched)
        log.warning("session %r is closed to make room for others", session.name)
        self.close(session.name)
        return True

    def _reap(self) -> None:
        """Close sessions that have been idle for longer than they may."""
        now = time.monotonic()
        if now - self._reaped < REAP_SECONDS:
            return
        self._reaped = now
        for name in [name for name, session in self._open.items() if session.expired(now)]:
            log.info("session %r is closed: nothing came for %g s", name, self._open[name].idle)
            self.close(name)
