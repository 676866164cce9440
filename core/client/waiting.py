"""The waiting queue as the front counts it, and its limits: submitted requests that the engine hasn't started."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trunkline.core.errors import QueueFull, RequestError
from trunkline.core.settings import ServerSettings
from trunkline.core.types import ServedModel, Submission

from .replies import EngineReply

QUEUE_POOLS = 16  # prompt tokens that may wait, in KV pools
FALLBACK_POOL = 1 << 16  # tokens; stands in for the pool of a model that has none (encoders)


def displaced() -> QueueFull:
    """What a waiting request is told that made room for one of higher priority. The words are SGLang's."""
    return QueueFull("The request is aborted by a higher priority request.")


@dataclass(eq=False, slots=True)
class Batch:
    """The sequences of one submission. They leave the queue one by one, but are displaced together."""

    model: str
    priority: int
    order: int  # of arrival
    replies: Sequence[EngineReply]
    waiting: int  # of the replies
    tokens: int  # prompt tokens of those


class WaitingRoom:
    """Bounded by sequences and prompt tokens of each model, and by sequences of all models.

    A batch that doesn't fit displaces batches of lower priority: those of its model before others, then the
    lowest first, of equal ones the latest.
    """

    def __init__(self, limits: ServerSettings) -> None:
        self.replies: dict[int, EngineReply] = {}  # those that wait, by key
        self._limits = limits
        self._batches: dict[int, Batch] = {}  # of each of them, by the same key
        self._arrivals = itertools.count()
        # By the model's name at submission: updates rename models.
        self._counts: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def make_room(self, model: ServedModel | None, name: str, items: Sequence[Submission]) -> list[EngineReply]:
        """The live replies that must end before all of ``items`` fit, mostly none. Nothing is changed.

        RequestError 400 when they never fit, QueueFull (503) when they don't now.
        """
        count, tokens = len(items), sum(len(item.prompt) for item in items)
        most_tokens = self._most_tokens(model)
        self._check(count, tokens, most_tokens)
        missing = self._counts[name] + count - self._limits.max_queued_requests
        missing_tokens = self._tokens[name] + tokens - most_tokens
        missing_at_all = len(self.replies) + count - self._limits.max_queued_requests_all_models
        if max(missing, missing_tokens, missing_at_all) <= 0:
            return []
        victims: list[EngineReply] = []
        for batch in self._lower(max(item.priority for item in items), name):
            own = batch.model == name
            if max(missing, missing_tokens, missing_at_all) <= 0 or not (own or missing_at_all > 0):
                break
            missing_at_all -= batch.waiting
            if own:
                missing -= batch.waiting
                missing_tokens -= batch.tokens
            victims += [reply for reply in batch.replies if not reply.over]
        if max(missing, missing_tokens, missing_at_all) > 0:
            raise QueueFull
        return victims

    def _most_tokens(self, model: ServedModel | None) -> int:
        pool = model.max_total_tokens if model is not None and model.info.causal else FALLBACK_POOL
        return self._limits.max_queued_tokens or QUEUE_POOLS * pool

    def _check(self, count: int, tokens: int, most_tokens: int) -> None:
        """RequestError for what never fits."""
        limits = self._limits
        for number, most, what, flag in (
            (count, limits.max_queued_requests, "sequences", "--max-queued-requests"),
            (count, limits.max_queued_requests_all_models, "sequences", "--max-queued-requests-all-models"),
            (tokens, most_tokens, "prompt tokens", "--max-queued-tokens"),
        ):
            if number > most:
                raise RequestError(
                    f"{number} {what} can't be queued at once; the limit is {most} ({flag}): send fewer at a time."
                )

    def _lower(self, priority: int, model: str) -> list[Batch]:
        """Waiting batches of a lower priority in the order in which they are displaced, those of ``model`` first."""
        found = [batch for batch in dict.fromkeys(self._batches.values()) if batch.priority < priority]
        return sorted(found, key=lambda batch: (batch.model != model, batch.priority, -batch.order))

    def enter(self, replies: Sequence[EngineReply], priority: int) -> None:
        """A batch has been submitted, and its room was made."""
        if not replies:
            return
        tokens = sum(reply.prompt_tokens for reply in replies)
        batch = Batch(replies[0].model, priority, next(self._arrivals), replies, len(replies), tokens)
        self._counts[batch.model] += len(replies)
        self._tokens[batch.model] += tokens
        for reply in replies:
            self.replies[reply.key] = reply
            self._batches[reply.key] = batch

    def leave(self, reply: EngineReply) -> None:
        """Harmless when it has left already."""
        if self.replies.pop(reply.key, None) is None:
            return
        batch = self._batches.pop(reply.key)
        batch.waiting -= 1
        batch.tokens -= reply.prompt_tokens
        self._counts[batch.model] -= 1
        self._tokens[batch.model] -= reply.prompt_tokens
        if not self._counts[batch.model]:
            del self._counts[batch.model], self._tokens[batch.model]

    def clear(self) -> None:
        self.replies.clear()
        self._batches.clear()
        self._counts.clear()
        self._tokens.clear()
