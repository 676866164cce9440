"""``Renewal``: gives replicas that come late the weights, label and pause of the others."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from trunkline.core.engine.messages import Answer, Call, Ready

from .link import Link
from .messages import Failure

log = logging.getLogger("trunkline.cluster")

AGAIN = 10.0  # seconds after which a replica that couldn't load the weights that are served tries it again


class Renewal:
    """What the replicas of a model serve: the weights with the highest number (:attr:`.ServedModel.update_number`).

    * ``ready``: what a replica that serves it said last; None until one is ready.
    * ``paused``: whether they only collect requests.
    """

    def __init__(self, links: Mapping[str, Link], ask: Callable[[Link, Call], Awaitable[Answer | Failure]]) -> None:
        """``links``: the replicas, by name; the caller changes it. ``ask`` makes a call."""
        self.ready: Ready | None = None
        self.paused = False
        self._links, self._ask = links, ask
        self._tasks: dict[Link, asyncio.Task[None]] = {}
        self._lacks: dict[Link, int] = {}  # the number of sent weights that it can't get, which was logged

    async def stop(self) -> None:
        """End what is being done."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def observe(self, ready: Ready, before: Ready | None) -> None:
        """A replica serves this now. ``before``: what it served; None when it has just come."""
        if self._is_newest(ready, before):
            self.ready = ready
        paused = any(ready.paused)
        if before is None:
            self.paused = self.paused or paused  # a front that comes late can't know which of two is right
        elif paused != any(before.paused):
            self.paused = paused

    def is_current(self, link: Link) -> bool:
        """Whether a replica serves the same as the others: no request may get the weights of another version."""
        ready = link.ready
        if self.ready is None or ready is None:
            return False
        return _number(ready) == _number(self.ready) and any(ready.paused) == self.paused

    def renew(self, link: Link) -> None:
        """Make a replica serve the same as the others, if it doesn't.

        Called with heartbeats, so that replicas have time to follow a call to all of them.
        """
        if self.ready is None or not link.up or link in self._tasks or self.is_current(link):
            return
        model = self.ready.models[0]
        if not model.weights_sent or self._has_weights(link):
            task = self._tasks[link] = asyncio.create_task(self._renew(link))
            task.add_done_callback(lambda _: self._tasks.pop(link, None))
        elif self._lacks.get(link) != model.update_number:
            self._lacks[link] = model.update_number
            log.error("replica %s lacks weights that were sent: it gets no requests until an update", link.name)

    def forget(self, link: Link) -> None:
        """A replica is gone."""
        self._lacks.pop(link, None)

    async def _renew(self, link: Link) -> None:
        while self.ready is not None and self._links.get(link.name) is link and not self.is_current(link):
            model = self.ready.models[0]
            if self._has_weights(link):
                call = Call(0, "pause", "", {"mode": "in_place"}) if self.paused else Call(0, "continue", "", {})
            elif model.weights_sent:
                return
            else:
                arguments: dict[str, Any] = {"model_path": model.model_path, "weight_version": model.weight_version}
                arguments |= {"update_number": model.update_number}
                call = Call(0, "update_weights", "", arguments)
            log.info("replica %s gets what the others serve: %s %s", link.name, call.control, call.arguments)
            answer = await self._ask(link, call)
            if isinstance(answer, Failure) or answer.error is not None or _refused(call, answer):
                log.error("replica %s doesn't serve what the others do: %s", link.name, answer)
                await asyncio.sleep(AGAIN)

    def _is_newest(self, ready: Ready, before: Ready | None) -> bool:
        if self.ready is None or _number(ready) > _number(self.ready):
            return True
        if _number(ready) == _number(self.ready):
            return before is not ready
        # Weights that were sent can't be had again when no replica has them any more.
        return self.ready.models[0].weights_sent and not any(map(self._has_weights, self._links.values()))

    def _has_weights(self, link: Link) -> bool:
        return link.ready is not None and self.ready is not None and _number(link.ready) == _number(self.ready)


def _refused(call: Call, answer: Answer) -> bool:
    return call.control == "update_weights" and not answer.value["success"]


def _number(ready: Ready) -> int:
    return ready.models[0].update_number
