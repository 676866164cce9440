"""Sessions: requests that continue earlier requests, whose tokens are put before their own.

Sessions exist in the front only. To the engine a continued prompt is a prompt like any other; most of it is in the
prefix cache.
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

MAX_SESSIONS = 1024  # if one more is opened, the session that has been idle for longest is closed
MAX_NODES = 1024  # requests in a session
MAX_TOKENS = 1 << 25  # prompt and output tokens of all sessions, four bytes each
DEFAULT_IDLE_TIMEOUT = 3600.0  # seconds without a request after which a session is closed
BUSY = "Streaming session already has an active request."
CLEANUP_SECONDS = 10.0  # between two searches for expired sessions


class Node:
    """A request in the tree of a session. While it runs, its output is the reply's; then the tokens are copied."""

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
        """Number of tokens that are stored in it."""
        return len(self._prompt) + len(self._output)

    def context(self, params: SessionParams) -> list[int]:
        """The tokens that a request with ``params`` continues: the prompt and the output so far, or a part of these."""
        tokens = self._prompt.tolist()
        if not params.drop_previous_output:
            tokens += self._output.tolist() if self._reply is None else self._reply.tokens
        return tokens[: params.offset] if params.offset else tokens

    def cancel(self) -> None:
        """Abort the request. Does nothing if it has finished."""
        if self._reply is not None:
            self._reply.cancel()

    async def wait(self) -> bool:
        """Wait for the reply's end and copy its output. False if it failed or was aborted."""
        reply = self._reply
        assert reply is not None
        with suppress(RequestError):
            await reply.result()
        self._output, self._reply = array("i", reply.tokens), None
        return reply.error is None and (reply.finish or {}).get("type") != "abort"

    def descendants(self) -> Iterator[Node]:
        """All requests that continue this one, directly or not."""
        pending = list(self.children)
        while pending:
            node = pending.pop()
            pending += node.children
            yield node


class Session:
    """A tree of requests; with ``streaming``, a chain of requests of which only the last is stored."""

    def __init__(self, name: str, *, streaming: bool = False, idle_timeout: float = DEFAULT_IDLE_TIMEOUT) -> None:
        """``idle_timeout``: seconds without a request after which the session is closed."""
        self.name = name
        self.streaming = streaming
        self.idle_timeout = idle_timeout
        self.model = ""  # name of the model that it belongs to; "" before the first request
        self.by_rid: dict[str, Node] = {}  # in a streaming session, the last request that succeeded
        self.nodes: set[Node] = set()  # all, including those whose rid was used again
        self.tokens = 0  # in all nodes
        self.running = 0
        self.last_used = time.monotonic()  # the last start or end of a request

    def expired(self, now: float) -> bool:
        """Whether the session has been idle for too long at the time ``now`` (``time.monotonic()``)."""
        return not self.running and now - self.last_used > self.idle_timeout

    def find(self, params: SessionParams) -> Node | None:
        """The request that one with ``params`` continues, None for a new root. The errors are SGLang's."""
        if self.streaming:
            return self._find_last(params)
        if params.rid is None:
            return None
        node = self.by_rid.get(params.rid)
        if node is None:
            raise RequestError("Invalid request session id", param="session_params")
        if not (params.replace or node.finished):
            raise RequestError(
                "Session request is appending to a request that hasn't finished.", param="session_params"
            )
        return node

    def _find_last(self, params: SessionParams) -> Node | None:
        if self.running:
            raise RequestError(BUSY, param="session_params")
        for value, name in (
            (params.replace, "replace"),
            (params.drop_previous_output, "drop_previous_output"),
            (params.offset, "offset"),
        ):
            if value:
                raise RequestError(f"Streaming sessions do not support {name}.", param="session_params")
        return next(iter(self.by_rid.values()), None)

    def add(self, node: Node, params: SessionParams) -> None:
        """Add a request that has been submitted. The requests that it replaces are removed first, and aborted."""
        if params.replace and node.parent is not None:
            node.parent.cancel()
            self._remove(node.parent.descendants())
            node.parent.children.clear()
        elif params.replace:
            self._remove(list(self.nodes))
        self.nodes.add(node)
        self.tokens += node.size
        self.running += 1
        self.last_used = time.monotonic()
        if not self.streaming:
            self.by_rid[node.rid] = node
            if node.parent is not None:
                node.parent.children.append(node)

    async def follow(self, node: Node) -> None:
        """Wait until a request has finished. If it failed, a streaming session continues from the request before."""
        size_before = node.size
        succeeded = await node.wait()
        self.running -= 1
        self.last_used = time.monotonic()
        if node not in self.nodes:
            return
        self.tokens += node.size - size_before
        if self.streaming:
            node.parent = None
            self._remove([other for other in self.nodes if (other is node) != succeeded])
            self.by_rid = {other.rid: other for other in self.nodes}

    def _remove(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            node.cancel()
            self.nodes.remove(node)
            self.tokens -= node.size
            if self.by_rid.get(node.rid) is node:
                del self.by_rid[node.rid]


class Sessions:
    """The open sessions of a server."""

    def __init__(self) -> None:
        self._open: dict[str, Session] = {}
        self._cleanup: asyncio.TimerHandle | None = None  # set while sessions are open
        self._watchers: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, name: str | None, *, streaming: bool = False, idle_timeout: float | None = None) -> str:
        """Open a session and return its name, a new one if ``name`` is None. RequestError if that name is in use."""
        name = uuid.uuid4().hex if name is None else name
        if name in self._open and not self._open[name].expired(time.monotonic()):
            raise RequestError("Failed to open the session. Check if a session with the same id is still open.")
        if len(self._open) >= MAX_SESSIONS and not self._close_idle():
            raise RequestError(
                f"{MAX_SESSIONS} sessions are open, and requests run in all of them; close one, or try again later.",
                status=503,
                retry_after=1.0,
            )
        if idle_timeout is None:
            idle_timeout = DEFAULT_IDLE_TIMEOUT
        self._open[name] = Session(name, streaming=streaming, idle_timeout=idle_timeout)
        if self._cleanup is None:
            self._cleanup = asyncio.get_running_loop().call_later(CLEANUP_SECONDS, self._close_expired)
        return name

    def close(self, name: str) -> None:
        """Close a session; its running requests continue. Does nothing if it isn't open."""
        self._open.pop(name, None)

    def get(self, name: str) -> Session:
        """The open session with this name. RequestError if there is none."""
        session = self._open.get(name)
        if session is None or session.expired(time.monotonic()):
            raise RequestError(f"Invalid request: session id {name} does not exist", param="session_params")
        return session

    def make_room(self, tokens: int, own: Sequence[Session]) -> None:
        """Close idle sessions, except ``own``, until ``tokens`` more can be stored. RequestError 503 if they can't."""
        while sum(session.tokens for session in self._open.values()) + tokens > MAX_TOKENS:
            if not self._close_idle(own):
                raise RequestError(
                    f"The open sessions hold as many tokens as they may ({MAX_TOKENS}); close one, or try again later.",
                    status=503,
                    retry_after=1.0,
                )

    def add_request(self, session: Session, params: SessionParams, node: Node) -> None:
        """Add a submitted request to its session, and its output when it has finished."""
        session.add(node, params)
        watcher = asyncio.create_task(session.follow(node), name="session request")
        self._watchers.add(watcher)
        watcher.add_done_callback(self._watchers.discard)

    def _close_idle(self, own: Sequence[Session] = ()) -> bool:
        """Close the session that has been idle for longest, but none of ``own``. False if there is no idle one."""
        idle = [session for session in self._open.values() if not session.running and session not in own]
        if not idle:
            return False
        session = min(idle, key=lambda session: session.last_used)
        log.warning("session %r is closed to make room for others", session.name)
        self.close(session.name)
        return True

    def _close_expired(self) -> None:
        now = time.monotonic()
        for name in [name for name, session in self._open.items() if session.expired(now)]:
            log.info("session %r is closed: it had no request for %g s", name, self._open[name].idle_timeout)
            self.close(name)
        self._cleanup = None
        if self._open:
            self._cleanup = asyncio.get_running_loop().call_later(CLEANUP_SECONDS, self._close_expired)
