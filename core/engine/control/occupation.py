"""Releases a model's memory (weights, KV cache, or both) to the operating system, and takes it again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import msgspec
from msgspec import Struct

from trunkline.core.engine.lane import Lane
from trunkline.core.engine.memory import gib
from trunkline.core.engine.messages import Answer, Call
from trunkline.core.errors import RequestError
from trunkline.core.model.sources.catalogue import cache_folder

from .pages import Region, Saved, give_back, pages_of, size_of, supported, tensors_of, without

log = logging.getLogger("trunkline.engine")

Tag = Literal["weights", "kv_cache"]
BUSY = "release_memory_occupation should be called only when server is idle."  # SGLang's words


class MemoryTags(Struct, kw_only=True):
    """Arguments of both controls. No ``tags`` mean all; ``everywhere``: of all models."""

    tags: list[Tag] = []
    everywhere: bool = False

    @property
    def chosen(self) -> frozenset[Tag]:
        return frozenset(self.tags or ("weights", "kv_cache"))


class OccupiedLoop(Protocol):
    """What is needed of the engine loop."""

    lanes: list[Lane]

    def send(self, messages: list[Any]) -> None: ...
    def abort_all(self, lane: Lane, *, probes_only: bool = False) -> None: ...
    def long_work(self, what: str) -> AbstractContextManager[None]: ...


class Occupation:
    """The controls ``release_memory`` and ``resume_memory``.

    A lane without some of its memory is halted: requests are accepted and wait. An engine that is started in place
    of one that was lost has all of its memory.
    """

    def __init__(self, loop: OccupiedLoop) -> None:
        self._loop = loop
        self.controls: dict[str, Callable[[Lane, Call], None]] = {
            "release_memory": self.release,
            "resume_memory": self.resume,
        }

    def release(self, lane: Lane, call: Call) -> None:
        """Give memory back. RequestError, and nothing is given, while a request needs it."""
        order = msgspec.convert(call.arguments, MemoryTags)
        lanes = self._loop.lanes if order.everywhere else [lane]
        if not supported() or any(one.model.device.type != "cpu" for one in lanes):
            raise RequestError("Memory can be released only on Linux, and only that of models on the CPU.")
        for one in lanes:
            self._loop.abort_all(one, probes_only=True)
            if one.scheduler.running or (one.scheduler.waiting and not one.halted):
                raise RequestError(BUSY)
        with self._loop.long_work("releasing memory"):
            weighty = [one for one in lanes if "weights" in order.chosen - one.released]
            try:
                saved = [(one, Saved(self._weights(one), cache_folder())) for one in weighty]
            except OSError as error:
                raise RequestError(f"The weights can't be put aside: {error}.") from error
            for one, weights in saved:
                self._give(one, "weights", weights.regions, weights)
            for one in lanes:
                if "kv_cache" in order.chosen - one.released:
                    one.flush()  # nothing runs, so it can't fail
                    self._give(one, "kv_cache", _pool(one), None)
        self._loop.send([Answer(call.key)])

    def _give(self, lane: Lane, tag: Tag, pages: Sequence[Region], saved: Saved | None) -> None:
        try:
            give_back(pages)
        except OSError as error:
            if saved is not None:  # some may be gone
                saved.restore()
            raise RequestError(f"The system doesn't take the memory of {lane.served.name}: {error}.") from error
        lane.released |= {tag}
        lane.put_aside = saved or lane.put_aside
        log.info("%s: %s of %s are released", lane.served.name, gib(size_of(pages)), tag)

    def _weights(self, lane: Lane) -> list[Region]:
        """All that the model holds, but for what another model holds too, and pools, which it may know."""
        foreign = [page for one in self._loop.lanes for page in _pool(one)]
        for one in self._loop.lanes:
            if one is not lane:
                foreign += pages_of(tensors_of(one.model))
        return without(pages_of(tensors_of(lane.model)), foreign)

    def resume(self, lane: Lane, call: Call) -> None:
        """Take memory again; what wasn't released is left alone."""
        order = msgspec.convert(call.arguments, MemoryTags)
        with self._loop.long_work("taking memory again"):
            for one in self._loop.lanes if order.everywhere else [lane]:
                tags = order.chosen & one.released
                if "weights" in tags:
                    assert one.put_aside is not None
                    try:
                        one.put_aside.restore()
                    except OSError as error:
                        raise RequestError(f"The weights can't be read again: {error}.", status=500) from error
                    one.put_aside = None
                one.released -= tags
                if tags:
                    log.info("%s has its memory again: %s", one.served.name, ", ".join(sorted(tags)))
        self._loop.send([Answer(call.key)])


def _pool(lane: Lane) -> list[Region]:
    pool = lane.runner.pool
    return [] if pool is None else pages_of([*pool.keys, *pool.values])
