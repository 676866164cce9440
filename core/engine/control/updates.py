"""Weight updates in the loop: loaded at once, put in place when the lane's running requests have ended, or are paused.

Requests that come meanwhile are held back and start with the new weights. While a checkpoint is
loaded nothing runs, so the front is told that this pass takes long.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from trunkline.core.engine.lane import Lane, Renewal
from trunkline.core.engine.messages import Answer, Beat, Call, Changed, Submit
from trunkline.core.errors import RequestError
from trunkline.core.model.sources.tensor_file import MAX_HEADER
from trunkline.core.types import Step

log = logging.getLogger("trunkline.engine")

MAX_NUMBERS = 1 << 21  # in one answer; as msgpack some 19 MB
WIDEST = 8  # bytes of a number that is sent: float64
SUCCEEDED, SENT = "Succeeded to update model weights.", "Success"  # SGLang's words


class UpdateWeights(Struct, kw_only=True):
    """Arguments of the control ``update_weights``."""

    model_path: str
    load_format: str | None = None
    abort_all_requests: bool = False
    weight_version: str | None = None


class UpdateTensors(Struct, kw_only=True):
    """Arguments of the control ``update_weights_from_tensor``: a safetensors file, which need not stay there."""

    path: str
    abort_all_requests: bool = False
    weight_version: str | None = None


class NameWeights(Struct, kw_only=True):
    """Arguments of the control ``update_weight_version``."""

    new_version: str
    abort_all_requests: bool = True


class ReadWeights(Struct, kw_only=True):
    """Arguments of the control ``get_weights_by_name``."""

    name: str
    truncate_size: int = 100


class Refusal(Exception):
    """New weights can't be used; the message is for the client."""


Order = UpdateWeights | UpdateTensors
Renew = Callable[[Lane, Order], Renewal]


class UpdatableLoop(Protocol):
    """What weight updates need of the engine loop."""

    lanes: list[Lane]

    def send(self, messages: list[Any]) -> None: ...
    def handle(self, message: Any) -> None: ...
    def abort_all(self, lane: Lane) -> None: ...
    def know_names(self) -> None: ...
    def report(self, lane: Lane, steps: Sequence[Step]) -> None: ...
    def pulse(self) -> Beat: ...
    def long_work(self, what: str) -> AbstractContextManager[None]: ...


@dataclass(slots=True)
class Pending:
    """Loaded weights that wait for the lane's requests to end, and what waits for the weights."""

    renewal: Renewal
    call: int
    order: Order
    held: dict[int, Submit | Call] = field(default_factory=dict)  # by key, in order of arrival


class Updates:
    """The loop's part of weight updates."""

    def __init__(self, loop: UpdatableLoop, renew: Renew | None) -> None:
        """``renew`` loads a checkpoint beside a lane's own; None: this engine can't."""
        self._loop = loop
        self._renew = renew
        self._pending: dict[Lane, Pending] = {}
        self.controls: dict[str, Callable[[Lane, Call], None]] = {
            "update_weights": lambda lane, call: self.update(lane, call, UpdateWeights),
            "update_weights_from_tensor": lambda lane, call: self.update(lane, call, UpdateTensors),
            "tensor_limit": self.limit,
            "update_weight_version": self.name,
            "get_weights_by_name": self.read,
        }

    @property
    def pending(self) -> bool:
        """Does any lane wait to be given its weights?"""
        return bool(self._pending)

    def hold(self, lane: Lane, message: Submit | Call) -> bool:
        """Keep a message until the lane has its new weights; False when it waits for none."""
        pending = self._pending.get(lane)
        if pending is not None:
            pending.held[message.key] = message
        return pending is not None

    def _held(self, lane: Lane, call: Call, aborts: bool) -> bool:
        """:meth:`hold`; a call that aborts ends at once what the weights wait for."""
        held = self.hold(lane, call)
        if held and aborts:
            self._loop.abort_all(lane)
        return held

    def waiting(self, lane: Lane) -> int:
        """Requests that are held for the lane; any thread may ask."""
        pending = self._pending.get(lane)
        return 0 if pending is None else sum(isinstance(one, Submit) for one in list(pending.held.values()))

    def drop(self, key: int) -> bool:
        """Forget a held request; False when there is none of this key."""
        return any(pending.held.pop(key, None) is not None for pending in self._pending.values())

    def update(self, lane: Lane, message: Call, kind: type[Order]) -> None:
        """Load at once; the answer follows when the weights are in place, or now if they can't be used."""
        order = msgspec.convert(message.arguments, kind)
        if self._held(lane, message, order.abort_all_requests):
            return
        if self._renew is None:
            raise RequestError("This engine's weights can't be updated.")
        what = repr(order.model_path) if isinstance(order, UpdateWeights) else "tensors that were sent"
        with self._loop.long_work(f"loading {what} into {lane.served.name!r}"):
            try:
                renewal = self._renew(lane, order)
            except Refusal as refusal:
                log.warning("%s keeps its weights. %s", lane.served.name, refusal)
                self._answer(message.key, order, False, str(refusal))
                return
        self._pending[lane] = Pending(renewal, message.key, order)
        if order.abort_all_requests:
            self._loop.abort_all(lane)

    def name(self, lane: Lane, message: Call) -> None:
        """Give the weights another label, by default after ending all requests."""
        order = msgspec.convert(message.arguments, NameWeights)
        if self._held(lane, message, order.abort_all_requests):
            return
        if order.abort_all_requests:
            self._loop.abort_all(lane)
        version = order.new_version
        if not lane.sent:  # else a restarted engine has other weights, which mustn't be called so
            lane.settings = msgspec.structs.replace(lane.settings, weight_version=version)
        lane.served = msgspec.structs.replace(lane.served, weight_version=version)
        self.changed()
        answer = {"success": True, "message": f"Weight version updated to {version}", "new_version": version}
        self._loop.send([Answer(message.key, answer)])

    def limit(self, lane: Lane, call: Call) -> None:
        """How many bytes a safetensors file of all tensors may have."""
        assert lane.candidate is not None
        numbers = sum(shape.numel() for shape in lane.candidate.plan.shapes.values())
        self._loop.send([Answer(call.key, WIDEST * numbers + MAX_HEADER)])

    def read(self, lane: Lane, message: Call) -> None:
        """The first rows of a tensor, as nested lists."""
        order = msgspec.convert(message.arguments, ReadWeights)
        if "weights" in lane.released:
            raise RequestError("The weights are released; call /resume_memory_occupation first.")
        one = lane.model.tensor(order.name, 1)
        if one is None:
            raise RequestError("Get parameter by name failed", param="name")
        # As many rows as may be sent and one more: packed matrices are unpacked to be read.
        most = MAX_NUMBERS // max(1, one.numel()) + 1
        tensor = lane.model.tensor(order.name, min(max(order.truncate_size, 0), most))
        if tensor.numel() > MAX_NUMBERS:
            raise RequestError(
                f"truncate_size {order.truncate_size} makes too many numbers of {order.name}; "
                f"at most {MAX_NUMBERS} are sent at once, {most - 1} rows.",
                param="truncate_size",
            )
        self._loop.send([Answer(message.key, tensor.float().tolist())])

    def settle(self) -> None:
        """Put loaded weights in place where nothing runs any more, and let go what was held for them."""
        for lane in [lane for lane in self._pending if lane.halted or not lane.busy]:
            pending = self._pending.pop(lane)
            new, order = pending.renewal.served, pending.order
            paused = lane.scheduler.running + lane.scheduler.waiting
            ended = lane.renew(pending.renewal)
            release_memory()
            self.changed()
            self._loop.report(lane, ended)
            if isinstance(order, UpdateWeights):
                log.info("%s: weights of %s are in place", new.name, new.model_path)
            else:
                log.info("%s: tensors that were sent are in place, until the engine is started again", new.name)
            done = SUCCEEDED if isinstance(order, UpdateWeights) else SENT
            named = "" if order.weight_version is None else f" Weight version updated to {order.weight_version}."
            self._answer(pending.call, order, True, done + named, paused)
            for message in pending.held.values():
                self._loop.handle(message)

    def _answer(self, call: int, order: Order, success: bool, message: str, paused: int = 0) -> None:
        answer: dict[str, Any] = {"success": success, "message": message}
        if isinstance(order, UpdateWeights):  # SGLang says no number for tensors
            answer["num_paused_requests"] = paused
        self._loop.send([Answer(call, answer)])

    def changed(self) -> None:
        """Tell the front what the lanes are now, before anybody is answered."""
        lanes = self._loop.lanes
        self._loop.know_names()
        settings = [lane.settings.table() for lane in lanes]
        changed = Changed([lane.served for lane in lanes], settings, [lane.paused for lane in lanes])
        self._loop.send([changed, self._loop.pulse()])  # whose numbers go by the models' names


def release_memory() -> None:
    """Free models that nothing uses any more; their modules refer to each other, so counting doesn't.

    What was loaded at start-up may be frozen, which hides it from the collector.
    """
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
