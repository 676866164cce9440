"""Request observers: their methods, and when each is called."""

from __future__ import annotations

from .clients import Reply


class RequestObserver:
    """Its methods are called for every request of any task, in a server (in the front) or a ``trunkline.core.Engine``.

    The order for one request: ``submitted``, then ``started``, then ``progressed`` for each message with results, then
    ``ended``. ``ended`` is called exactly once, possibly without some of the others: a request can be aborted while
    it waits, and one that its stage refuses never starts. The fields of the reply have model, task, tokens and times.

    All methods run on the client's event loop, which serves every request: they must be short and must not block.
    Override only those that you need; the others aren't called. An exception ends no request: each is counted, and the
    first one of each method is logged with the plugin's name.
    """

    def submitted(self, reply: Reply) -> None:
        """The request is queued. Not called for requests that are rejected before (full queue, wrong id)."""

    def started(self, reply: Reply) -> None:
        """The request has left the queue; ``reply.cached_tokens`` is known."""

    def progressed(self, reply: Reply, tokens: int) -> None:
        """A message with results has arrived: ``tokens`` new output tokens, 0 for a vector or a score.

        Called once per message, which may hold many tokens, and before the message is added to the reply:
        ``reply.tokens``, ``reply.first`` and ``reply.latest`` don't include it yet.
        """

    def ended(self, reply: Reply) -> None:
        """The request has ended, for any reason.

        ``reply.error`` is set if it failed (also by a timeout or because the engine died); otherwise
        ``reply.finish["type"]`` is the reason, "abort" if a client aborted it.
        """
