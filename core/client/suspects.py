"""Recognises requests that were running when the engine died, by their content, when they are sent again.

After one death a request may be sent again. It then runs alone: in forward passes without other requests, one such
request per model at a time. So if the engine dies again, this request is the cause. If it completes, it is treated
as an ordinary request again. After two deaths it is rejected.
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

MAX_DEATHS = 2  # a request that was running at this many deaths of the engine is rejected
MAX_REMEMBERED = 4096  # requests whose deaths are remembered


class CrashSuspects:
    """The requests and calls that were sent to the engine or wait to be sent, and the deaths by their content."""

    def __init__(self) -> None:
        self._deaths: dict[bytes, int] = {}  # digest of the content -> deaths, oldest first
        self._contents: dict[int, bytes] = {}  # key of a live request or call -> digest of its content
        self._queues: dict[str, deque[Submit]] = {}  # model -> the suspect that runs, then those that wait for it

    def admit(self, messages: Sequence[Submit], items: Sequence[Submission]) -> list[Submit]:
        """Returns those that may be sent to the engine now; :meth:`ended` returns the others later.

        RequestError 500, and none is admitted, if one was running at two deaths of the engine.
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
        """The same for a call of a control, which always runs between two passes."""
        digest = _digest(call.control, call.model, call.arguments)
        self._check([digest])
        self._contents[call.key] = digest

    def _check(self, digests: Iterable[bytes]) -> None:
        if self._deaths and any(self._deaths.get(digest, 0) >= MAX_DEATHS for digest in digests):
            raise died_twice()

    def ended(self, key: int, *, aborted: bool = False) -> list[Submit]:
        """The engine has sent the last message about a request or call. Returns the requests that may be sent now."""
        digest = self._contents.pop(key, b"")
        if not aborted:  # it has completed
            self._deaths.pop(digest, None)
        return self._leave(key)

    def dropped(self, key: int) -> None:
        """The client no longer waits for a request. If it was sent to the engine, it is kept until :meth:`ended`."""
        if any(message.key == key for queue in self._queues.values() for message in list(queue)[1:]):
            del self._contents[key]
            self._leave(key)

    def _leave(self, key: int) -> list[Submit]:
        """Remove a suspect from its queue. Returns the next one if the first, which was running, was removed."""
        for queue in self._queues.values():
            for place, message in enumerate(queue):
                if message.key == key:
                    del queue[place]
                    return list(queue)[:1] if place == 0 else []
        return []

    def engine_died(self, keys: Iterable[int]) -> set[int]:
        """Count a death for the requests and calls ``keys``, which were running. Returns the keys of all that are
        rejected from now on."""
        running = {self._contents[key] for key in keys if key in self._contents}
        for digest in running:
            self._deaths[digest] = self._deaths.pop(digest, 0) + 1
        while len(self._deaths) > MAX_REMEMBERED:
            del self._deaths[next(iter(self._deaths))]
        refused = {key for key, digest in self._contents.items() if self._deaths.get(digest, 0) >= MAX_DEATHS}
        if running:
            log.error("the engine died while it ran %d requests; %d are not run again", len(running), len(refused))
        return refused

    def clear(self) -> None:
        """All requests and calls have ended. Their deaths are remembered."""
        self._contents.clear()
        self._queues.clear()


def died_twice() -> RequestError:
    """The error of a request that was running at two deaths of the engine."""
    return RequestError(
        "The engine stopped twice while it worked on this request, the second time on nothing else, so the request is "
        "not run again. Sending it again does not help; the server's log has the reasons.",
        status=500,
    )


def digest_of(message: Submit, item: Submission) -> bytes:
    """Hash by which a repeated request is recognised: model, task, tokens, vectors, params without volatile ones."""
    params: object = message.params
    if item.volatile:
        params = {
            name: value for name, value in msgspec.structs.asdict(item.params).items() if name not in item.volatile
        }
    return _digest(message.model, message.task, message.second_at, message.prompt, message.embeds, params)


def _digest(*content: object) -> bytes:
    return hashlib.blake2b(msgspec.msgpack.encode(content), digest_size=16).digest()
