"""Releases a model's memory (weights, KV cache, or both) to the operating system, and takes it back later."""

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

from .pages import Region, SavedPages, disjoint, pages_of, release_pages, supported, tensors_of, total_bytes

log = logging.getLogger("trunkline.engine")

Tag = Literal["weights", "kv_cache"]
BUSY = "release_memory_occupation should be called only when server is idle."  # SGLang's text


class MemoryTags(Struct, kw_only=True):
    """Arguments of both controls. No ``tags`` means all of them; ``all_models``: not only the model of the call."""

    tags: list[Tag] = []
    all_models: bool = False

    @property
    def selected(self) -> frozenset[Tag]:
        return frozenset(self.tags or ("weights", "kv_cache"))


class OccupiedLoop(Protocol):
    """The part of the engine loop that is used here."""

    lanes: list[Lane]

    def send(self, messages: list[Any]) -> None: ...
    def abort_all(self, lane: Lane, *, probes_only: bool = False) -> None: ...
    def long_work(self, description: str) -> AbstractContextManager[None]: ...


class Occupation:
    """The controls ``release_memory`` and ``resume_memory``.

    A lane without some of its memory is halted: it accepts requests, and they wait. An engine process that replaces a
    crashed one starts with all of its memory.
    """

    def __init__(self, loop: OccupiedLoop) -> None:
        self._loop = loop
        self.controls: dict[str, Callable[[Lane, Call], None]] = {
            "release_memory": self.release,
            "resume_memory": self.resume,
        }

    def release(self, lane: Lane, call: Call) -> None:
        """Release memory. RequestError, with nothing released, while a request needs it."""
        arguments = msgspec.convert(call.arguments, MemoryTags)
        lanes = self._loop.lanes if arguments.all_models else [lane]
        if not supported() or any(lane.model.device.type != "cpu" for lane in lanes):
            raise RequestError("Memory can be released only on Linux, and only that of models on the CPU.")
        for lane in lanes:
            self._loop.abort_all(lane, probes_only=True)
            if lane.scheduler.running or (lane.scheduler.waiting and not lane.halted):
                raise RequestError(BUSY)
        with self._loop.long_work("releasing memory"):
            # Save the weights of all lanes first: if there is no room for them, nothing has been released.
            to_save = [lane for lane in lanes if "weights" in arguments.selected - lane.released]
            try:
                saved = [(lane, SavedPages(self._weight_pages(lane), cache_folder())) for lane in to_save]
            except OSError as error:
                raise RequestError(f"The weights can't be saved to disk: {error}.") from error
            for lane, weights in saved:
                self._release_pages(lane, "weights", weights.regions, weights)
            for lane in lanes:
                if "kv_cache" in arguments.selected - lane.released:
                    lane.flush()  # nothing runs, so it can't fail
                    self._release_pages(lane, "kv_cache", _pool_pages(lane), None)
        self._loop.send([Answer(call.key)])

    def _release_pages(self, lane: Lane, tag: Tag, pages: Sequence[Region], saved: SavedPages | None) -> None:
        try:
            release_pages(pages)
        except OSError as error:
            if saved is not None:
                saved.restore()  # some pages may have been released before the error
            raise RequestError(f"The memory of {lane.served.name} can't be released: {error}.") from error
        lane.released |= {tag}
        lane.saved_weights = saved or lane.saved_weights
        log.info("%s: released %s of %s", lane.served.name, gib(total_bytes(pages)), tag)

    def _weight_pages(self, lane: Lane) -> list[Region]:
        """The pages of a model's tensors, except those that it shares with other models and those of KV pools."""
        excluded = [page for other in self._loop.lanes for page in _pool_pages(other)]
        for other in self._loop.lanes:
            if other is not lane:
                excluded += pages_of(tensors_of(other.model))
        return disjoint(pages_of(tensors_of(lane.model)), excluded)

    def resume(self, lane: Lane, call: Call) -> None:
        """Take released memory back, weights with their former contents. RequestError 500 if these can't be read."""
        arguments = msgspec.convert(call.arguments, MemoryTags)
        lanes = self._loop.lanes if arguments.all_models else [lane]
        with self._loop.long_work("taking released memory back"):
            for lane in lanes:
                tags = arguments.selected & lane.released
                if "weights" in tags:
                    assert lane.saved_weights is not None
                    try:
                        lane.saved_weights.restore()
                    except OSError as error:
                        raise RequestError(f"The saved weights can't be read: {error}.", status=500) from error
                    lane.saved_weights = None
                lane.released -= tags
                if tags:
                    log.info("%s: memory restored: %s", lane.served.name, ", ".join(sorted(tags)))
        self._loop.send([Answer(call.key)])


def _pool_pages(lane: Lane) -> list[Region]:
    pool = lane.runner.pool
    return [] if pool is None else pages_of([*pool.keys, *pool.values])
