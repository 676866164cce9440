"""Limits on the waiting queue, enforced in the front: submitted requests that the engine hasn't started."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from trunkline.core.errors import QueueFull, RequestError
from trunkline.core.settings import ServerSettings
from trunkline.core.types import ServedModel, Submission

from .replies import EngineReply

QUEUE_POOLS = 16  # default limit on prompt tokens that wait for a model, in multiples of its KV pool
FALLBACK_POOL = 1 << 16  # tokens: used in place of the pool size for models without a pool (encoders)


def displaced() -> QueueFull:
    """The error of a waiting request that is displaced by one of higher priority. The text is SGLang's."""
    return QueueFull("The request is aborted by a higher priority request.")


@dataclass(eq=False, slots=True)
class QueuedGroup:
    """Sequences that were submitted together. They leave the queue one by one, but are displaced together."""

    model: str
    priority: int
    order: int  # of arrival
    replies: Sequence[EngineReply]
    waiting: int  # number of replies that still wait
    tokens: int  # their prompt tokens


class QueueLimits:
    """Bounds the waiting sequences and prompt tokens of each model, and the waiting sequences of all models.

    If new sequences don't fit, waiting groups of lower priority are displaced: those of the same model before
    others, then the lowest priority first, then the latest first.
    """

    def __init__(self, limits: ServerSettings) -> None:
        self.replies: dict[int, EngineReply] = {}  # key of a waiting request -> its reply
        self._limits = limits
        self._groups: dict[int, QueuedGroup] = {}  # the same keys -> the group of each
        self._arrivals = itertools.count()
        # By the model's name at submission (updates rename models):
        self._counts: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()

    def make_room(self, model: ServedModel | None, name: str, items: Sequence[Submission]) -> list[EngineReply]:
        """Returns the waiting replies that must be displaced so that ``items`` fit, usually none; changes nothing.

        RequestError 400 when the items exceed a limit by themselves, QueueFull (503) when they don't fit now.
        """
        count, tokens = len(items), sum(len(item.prompt) for item in items)
        most_tokens = self._most_tokens(model)
        self._check(count, tokens, most_tokens)
        # How far each limit is exceeded:
        excess = self._counts[name] + count - self._limits.max_queued_requests
        excess_tokens = self._tokens[name] + tokens - most_tokens
        excess_all = len(self.replies) + count - self._limits.max_queued_requests_all_models
        if max(excess, excess_tokens, excess_all) <= 0:
            return []
        victims: list[EngineReply] = []
        for group in self._lower(max(item.priority for item in items), name):
            own = group.model == name
            if max(excess, excess_tokens, excess_all) <= 0 or not (own or excess_all > 0):
                break
            excess_all -= group.waiting
            if own:
                excess -= group.waiting
                excess_tokens -= group.tokens
            victims += [reply for reply in group.replies if not reply.ended]
        if max(excess, excess_tokens, excess_all) > 0:
            raise QueueFull
        return victims

    def _most_tokens(self, model: ServedModel | None) -> int:
        pool = model.max_total_tokens if model is not None and model.info.causal else FALLBACK_POOL
        return self._limits.max_queued_tokens or QUEUE_POOLS * pool

    def _check(self, count: int, tokens: int, most_tokens: int) -> None:
        """RequestError when the items of one submission exceed a limit by themselves."""
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

    def _lower(self, priority: int, model: str) -> list[QueuedGroup]:
        """Waiting groups of a lower priority in the order in which they are displaced, those of ``model`` first."""
        found = [group for group in dict.fromkeys(self._groups.values()) if group.priority < priority]
        return sorted(found, key=lambda group: (group.model != model, group.priority, -group.order))

    def enter(self, replies: Sequence[EngineReply], priority: int) -> None:
        """Add sequences that were submitted together; :meth:`make_room` was called before."""
        if not replies:
            return
        tokens = sum(reply.prompt_tokens for reply in replies)
        group = QueuedGroup(replies[0].model, priority, next(self._arrivals), replies, len(replies), tokens)
        self._counts[group.model] += len(replies)
        self._tokens[group.model] += tokens
        for reply in replies:
            self.replies[reply.key] = reply
            self._groups[reply.key] = group

    def leave(self, reply: EngineReply) -> None:
        """Remove one. Does nothing when it was removed already."""
        if self.replies.pop(reply.key, None) is None:
            return
        group = self._groups.pop(reply.key)
        group.waiting -= 1
        group.tokens -= reply.prompt_tokens
        self._counts[group.model] -= 1
        self._tokens[group.model] -= reply.prompt_tokens
        if not self._counts[group.model]:
            del self._counts[group.model], self._tokens[group.model]

    def clear(self) -> None:
        self.replies.clear()
        self._groups.clear()
        self._counts.clear()
        self._tokens.clear()
