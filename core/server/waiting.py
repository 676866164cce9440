"""The waiting queue as the front counts it: submitted, and the engine has not said ``Started``."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import ServerSettings
from ..errors import QueueFull, RequestError
from ..types import ServedModel, Submission
from .replies import RemoteReply

QUEUE_POOLS = 16  # prompt tokens that may wait, in KV pools
FALLBACK_POOL = 1 << 16  # tokens; stands in for the pool of a model that has none (encoders)


class WaitingRoom:
    """Bounded by requests over all models, and by prompt tokens of each model."""

    def __init__(self, limits: ServerSettings) -> None:
        self.replies: dict[int, RemoteReply] = {}
        self._limits = limits
        self._tokens: dict[str, int] = {}  # model -> prompt tokens that wait for it

    def check(self, model: ServedModel | None, name: str, items: Sequence[Submission]) -> None:
        """All or none fit: RequestError 400 when they never will, QueueFull (503) when they don't now."""
        count, tokens = len(items), sum(len(item.prompt) for item in items)
        most = self._limits.max_queued_requests
        pool = model.max_total_tokens if model is not None and model.info.causal else FALLBACK_POOL
        most_tokens = self._limits.max_queued_tokens or QUEUE_POOLS * pool
        if count > most:
            raise RequestError(
                f"{count} sequences can't be queued at once; the limit is {most} (--max-queued-requests): "
                "send fewer at a time."
            )
        if tokens > most_tokens:
            raise RequestError(
                f"{tokens} prompt tokens can't be queued at once; the limit is {most_tokens} (--max-queued-tokens): "
                "send fewer at a time."
            )
        if len(self.replies) + count > most or self._tokens.get(name, 0) + tokens > most_tokens:
            raise QueueFull

    def enter(self, reply: RemoteReply) -> None:
        self.replies[reply.key] = reply
        self._tokens[reply.model] = self._tokens.get(reply.model, 0) + reply.prompt_tokens

    def leave(self, reply: RemoteReply) -> None:
        """Harmless when it has left already."""
        if self.replies.pop(reply.key, None) is not None:
            self._tokens[reply.model] -= reply.prompt_tokens
            if not self._tokens[reply.model]:
                del self._tokens[reply.model]  # models are renamed by updates

    def clear(self) -> None:
        self.replies.clear()
        self._tokens.clear()
