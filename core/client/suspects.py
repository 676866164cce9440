"""Recognises requests that were running when the engine died, by their content, when they are sent again.

After one death a request may be sent again. It is then computed in forward passes of its own, one such request per
model at a time, so that no other request can be the cause of a second death; when it ends in any other way, it
counts as an ordinary request again. After two deaths it is not run any more.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from trunkline.core.engine.messages import Call, Submit
from trunkline.core.errors import RequestError
from trunkline.core.types import Submission

log = logging.getLogger("trunkline.supervisor")

DEATHS = 2  # of the engine while it worked on a request, after which that is not run any more
REMEMBERED = 4096  # requests


class Suspects:
    """All that the engine has or is about to get, and the contents that it died over."""

    def __init__(self) -> None:
        self._deaths: dict[bytes, int] = {}  # digest of the content -> deaths, oldest first
        self._contents: dict[int, bytes] = {}  # key of what the engine has -> digest of its content
        self._queues: dict[str, deque[Submit]] = {}  # by model: the suspect that runs, then those that wait for it

    def admit(self, messages: Sequence[Submit], items: Sequence[Submission]) -> list[Submit]:
        """Those that may be sent to the engine now; the others follow when :meth:`ended` returns them.

        RequestError 500, and none is admitted, for a request over which the engine died twice.
        """
        digests = [digest_of(message, item) for message, item in zip(messages, items, strict=True)]
        self._check(digests)
        ready = []
        for message, digest in zip(messages, digests, strict=True):
            self._contents[message.key] = digest
            if digest in self._deaths:
                message.alone = True
                queue = self._queues.setdefault(message.model, deque())
                queue.append(message)
                if len(queue) > 1:
                    continue
            ready.append(message)
        return ready

    def admit_call(self, call: Call) -> None:
        """The same for a call of a control, which always runs alone."""
        digest = _digest(call.control, call.model, call.arguments)
        self._check([digest])
        self._contents[call.key] = digest

    def _check(self, digests: Iterable[bytes]) -> None:
        if self._deaths and any(self._deaths.get(digest, 0) >= DEATHS for digest in digests):
            raise died_twice()

    def ended(self, key: int, *, aborted: bool = False) -> list[Submit]:
        """The engine has sent its last word on a request or call. What may be sent now."""
        digest = self._contents.pop(key, b"")
        if not aborted:  # it was computed to its end
            self._deaths.pop(digest, None)
        return self._leave(key)

    def dropped(self, key: int) -> None:
        """Nobody waits for a request any more. One that the engine has is kept until :meth:`ended`."""
        if any(message.key == key for queue in self._queues.values() for message in list(queue)[1:]):
            del self._contents[key]
            self._leave(key)

    def _leave(self, key: int) -> list[Submit]:
        """Take a suspect out of its queue; the next one, if the first has left."""
        for queue in self._queues.values():
            for place, message in enumerate(queue):
                if message.key == key:
                    del queue[place]
                    return list(queue)[:1] if place == 0 else []
        return []

    def engine_died(self, keys: Iterable[int]) -> set[int]:
        """The engine died while it worked on ``keys``. Those of all that it had that must not be sent again."""
        over = {self._contents[key] for key in keys if key in self._contents}
        for digest in over:
            self._deaths[digest] = self._deaths.pop(digest, 0) + 1
        while len(self._deaths) > REMEMBERED:
            del self._deaths[next(iter(self._deaths))]
        refused = {key for key, digest in self._contents.items() if self._deaths.get(digest, 0) >= DEATHS}
        if over:
            log.error("the engine died while it worked on %d requests; %d are not run again", len(over), len(refused))
        self._contents.clear()
        self._queues.clear()
        return refused


def died_twice() -> RequestError:
    """What the client of a request is told over which the engine died twice."""
    return RequestError(
        "The engine stopped twice while it worked on this request, the second time on nothing else, so the request is "
        "not run again. Sending it again does not help; the server's log has the reasons.",
        status=500,
    )


def digest_of(message: Submit, item: Submission) -> bytes:
    """What recognises a request that is sent again: model, task, tokens, vectors and params but the volatile ones."""
    params: object = message.params
    if item.volatile:
        params = {
            name: value for name, value in msgspec.structs.asdict(item.params).items() if name not in item.volatile
        }
    return _digest(message.model, message.task, message.second_at, message.prompt, message.embeds, params)


def _digest(*content: object) -> bytes:
    return hashlib.blake2b(msgspec.msgpack.encode(content), digest_size=16).digest()
