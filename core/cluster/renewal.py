"""``Renewal``: gives replicas that come late the weights, label and pause of the others."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from trunkline.core.engine.messages import Answer, Call, Ready

from .link import Link
from .messages import Failure

log = logging.getLogger("trunkline.cluster")

AGAIN = 10.0  # seconds after which a replica that couldn't follow the others tries it again
GRACE = 10.0  # seconds in which a lost connection to a replica that has sent weights may be made again


class Renewal:
    """What the replicas of a model serve: the weights with the highest number, and of these the highest label
    (:attr:`.ServedModel.update_number`, ``label_number``).

    * ``ready``: what a replica that serves it said last; None until one is ready.
    * ``paused``: whether they only collect requests.
    """

    def __init__(self, links: Mapping[str, Link], ask: Callable[[Link, Call], Awaitable[Answer | Failure]]) -> None:
        """``links``: the replicas, by name; the caller changes it. ``ask`` makes a call."""
        self.ready: Ready | None = None
        self.paused = False
        self._links, self._ask = links, ask
        self._said: dict[str, Ready] = {}  # what each replica said last, also while its connection is lost
        self._lost_at = -GRACE  # when the connection to a replica with the weights was lost
        self._tasks: dict[Link, asyncio.Task[None]] = {}
        self._lacks: dict[Link, int] = {}  # the number of sent weights that it can't get, which was logged

    async def stop(self) -> None:
        """End what is being done."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def observe(self, link: Link, ready: Ready) -> None:
        """A replica serves this now."""
        before = self._said.get(link.name)
        self._said[link.name] = ready
        if self.ready is None or _numbers(ready) >= _numbers(self.ready):
            self.ready = ready
        paused = any(ready.paused)
        if before is None:
            self.paused = self.paused or paused  # a front that comes late can't know which of two is right
        elif paused != any(before.paused):
            self.paused = paused

    def is_current(self, link: Link) -> bool:
        """Whether a replica may get requests: none may get the weights of another version. The label doesn't matter."""
        return self._has_weights(link) and self._pauses(link)

    def renew(self, link: Link) -> bool:
        """Make a replica serve the same as the others, if it doesn't. True if the others have to follow it.

        Called with heartbeats, so that replicas have time to follow a call to all of them.
        """
        if self.ready is None or not link.up or link in self._tasks:
            return False
        model = self.ready.models[0]
        if model.weights_sent and not any(map(self._has_weights, self._links.values())):
            return self._give_up_sent_weights()
        if self._follows(link):
            return False
        if not model.weights_sent or self._has_weights(link):
            task = self._tasks[link] = asyncio.create_task(self._renew(link))
            task.add_done_callback(lambda _: self._tasks.pop(link, None))
        elif self._lacks.get(link) != model.update_number:
            self._lacks[link] = model.update_number
            log.error("replica %s lacks weights that were sent: it gets no requests until an update", link.name)
        return False

    def lose(self, link: Link) -> None:
        """The connection to a replica was lost, or is closed."""
        self._lacks.pop(link, None)
        if self._has_weights(link):
            self._lost_at = time.monotonic()

    def forget(self, name: str) -> None:
        """A replica is gone for good."""
        self._said.pop(name, None)

    async def _renew(self, link: Link) -> None:
        while self.ready is not None and self._links.get(link.name) is link and not self._follows(link):
            model = self.ready.models[0]
            arguments: dict[str, Any] = {}
            if not self._has_weights(link):
                if model.weights_sent:
                    return
                control, arguments = "update_weights", {"model_path": model.model_path}
                arguments |= {"weight_version": model.weight_version, "update_number": model.update_number}
            elif not self._has_label(link):
                control, arguments = "update_weight_version", {"new_version": model.weight_version}
                arguments |= {"label_number": model.label_number, "abort_all_requests": False}
            else:
                control, arguments = ("pause", {"mode": "in_place"}) if self.paused else ("continue", {})
            log.info("replica %s follows the others: %s %s", link.name, control, arguments)
            answer = await self._ask(link, Call(0, control, "", arguments))
            if isinstance(answer, Failure) or answer.error is not None or _refused(control, answer):
                log.error("replica %s doesn't serve what the others do: %s", link.name, answer)
                await asyncio.sleep(AGAIN)

    def _give_up_sent_weights(self) -> bool:
        """Serve the latest weights that a replica has: those that were sent can't be had again."""
        known = [link.ready for link in self._links.values() if link.up and link.ready is not None]
        if not known or time.monotonic() - self._lost_at < GRACE:
            return False
        self.ready = max(known, key=_numbers)
        log.error("no replica has the weights any more that were sent; those of %s are served", _path(self.ready))
        return True

    def _follows(self, link: Link) -> bool:
        return self.is_current(link) and self._has_label(link)

    def _has_weights(self, link: Link) -> bool:
        return link.ready is not None and self.ready is not None and _numbers(link.ready)[0] == _numbers(self.ready)[0]

    def _has_label(self, link: Link) -> bool:
        return link.ready is not None and self.ready is not None and _numbers(link.ready)[1] >= _numbers(self.ready)[1]

    def _pauses(self, link: Link) -> bool:
        return link.ready is not None and any(link.ready.paused) == self.paused


def _refused(control: str, answer: Answer) -> bool:
    return control == "update_weights" and not answer.value["success"]


def _numbers(ready: Ready) -> tuple[int, int]:
    return ready.models[0].update_number, ready.models[0].label_number


def _path(ready: Ready) -> str:
    return ready.models[0].model_path
