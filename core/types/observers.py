"""What request observers are told."""

from __future__ import annotations

from .clients import Reply


class RequestObserver:
    """Is told of every request, whatever its task, of the server (in the front) or of a ``trunkline.core.Engine``.

    For one request: ``submitted``, then ``started``, then ``progressed`` for each message with results, then
    ``ended``. ``ended`` is called exactly once and may come after any of the others: a request can be aborted while
    it waits, and one that its stage refuses never starts. The fields of the reply have model, task, tokens and times.

    All methods run on the client's event loop, which serves every request: they must be short and never wait.
    Override those that you need; the others aren't called. What a method raises ends no request: the first time it is
    logged with the plugin's name, and each time it is counted.
    """

    def submitted(self, reply: Reply) -> None:
        """The request is queued. Requests that are refused before that (full queue, wrong id) have no reply."""

    def started(self, reply: Reply) -> None:
        """The request has left the queue; ``reply.cached_tokens`` is known."""

    def progressed(self, reply: Reply, tokens: int) -> None:
        """A message with results has come: ``tokens`` new output tokens, 0 for a vector or a score.

        Called once per message, which may hold many tokens, and before the message is added to the reply:
        ``reply.tokens``, ``reply.first`` and ``reply.latest`` don't include it yet.
        """

    def ended(self, reply: Reply) -> None:
        """The request is over, whoever ended it.

        ``reply.error`` is set when it failed (the loss of the engine and timeouts included); otherwise
        ``reply.finish["type"]`` says how it ended, "abort" when a client gave it up.
        """
