"""Weight updates: new weights are loaded at once, and applied when the lane's requests have ended or are paused.

Requests that arrive in between are deferred until then. While weights are loaded, no lane computes anything, so the
front is told to allow more time than for a pass. With several replicas, an update has two phases: it is loaded and held
by each of them, then committed, or cancelled where one has refused it.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec

from trunkline.core.engine.lane import Lane
from trunkline.core.engine.messages import Answer, Call, Heartbeat, ModelsChanged, Submit
from trunkline.core.engine.weight_update import WeightUpdate
from trunkline.core.errors import RequestError
from trunkline.core.model.sources.tensor_file import MAX_HEADER
from trunkline.core.types import Step

from .update_arguments import (
    EndHold,
    ReadWeights,
    UpdateArguments,
    UpdateRefused,
    UpdateTensors,
    UpdateVersion,
    UpdateWeights,
)

log = logging.getLogger("trunkline.engine")

HOLD_SECONDS = 600.0  # within which an update that is held must be committed; its requests wait
MAX_NUMBERS = 1 << 21  # in one answer; about 19 MB as msgpack
MAX_NUMBER_BYTES = 8  # float64
WEIGHTS_UPDATED, TENSORS_UPDATED = "Succeeded to update model weights.", "Success"  # SGLang's texts


LoadUpdate = Callable[[Lane, UpdateArguments], WeightUpdate]
"""Loads new weights while the lane still has its current ones. Raises UpdateRefused."""


class UpdatableLoop(Protocol):
    """The part of the engine loop that is used here."""

    lanes: list[Lane]

    def send(self, messages: list[Any]) -> None: ...
    def handle(self, message: Any) -> None: ...
    def abort_all(self, lane: Lane) -> None: ...
    def index_names(self) -> None: ...
    def report(self, lane: Lane, steps: Sequence[Step]) -> None: ...
    def heartbeat(self) -> Heartbeat: ...
    def long_work(self, description: str) -> AbstractContextManager[None]: ...


@dataclass(slots=True)
class PendingUpdate:
    """Loaded weights that wait for the lane's requests to end, and the messages that wait for the weights."""

    update: WeightUpdate
    call: int  # key of the call to answer
    arguments: UpdateArguments
    hold: str  # "" when it may be applied
    held_since: float = field(default_factory=time.monotonic)
    deferred: dict[int, Submit | Call] = field(default_factory=dict)  # by key, in order of arrival


class WeightUpdates:
    """The controls that change, label or read weights, and the updates that are pending."""

    def __init__(self, loop: UpdatableLoop, load_update: LoadUpdate | None) -> None:
        """``load_update``: None if this engine can't update weights."""
        self._loop = loop
        self._load_update = load_update
        self._pending: dict[Lane, PendingUpdate] = {}
        self.controls: dict[str, Callable[[Lane, Call], None]] = {
            "update_weights": lambda lane, call: self.update(lane, call, UpdateWeights),
            "update_weights_from_tensor": lambda lane, call: self.update(lane, call, UpdateTensors),
            "commit_update": self.commit,
            "cancel_update": self.cancel,
            "tensor_limit": self.tensor_limit,
            "update_weight_version": self.update_version,
            "get_weights_by_name": self.read_tensor,
        }

    @property
    def loaded(self) -> list[WeightUpdate]:
        """The updates that wait to be applied."""
        return [pending.update for pending in self._pending.values()]

    @property
    def pending(self) -> bool:
        """Whether loaded weights wait to be applied to any lane, and nothing else than its requests delays that."""
        return any(not pending.hold for pending in self._pending.values())

    @property
    def held(self) -> bool:
        """Whether loaded weights wait to be committed. May be called from any thread."""
        return any(pending.hold for pending in list(self._pending.values()))

    def updates(self, lane: Lane) -> bool:
        """Whether loaded weights wait to be applied to this lane."""
        return lane in self._pending

    def defer(self, lane: Lane, message: Submit | Call) -> bool:
        """Keep a message until the lane has its new weights. False, and it isn't kept, if no update is pending."""
        pending = self._pending.get(lane)
        if pending is not None:
            pending.deferred[message.key] = message
        return pending is not None

    def _defer_call(self, lane: Lane, call: Call, aborts: bool) -> bool:
        """The same for a call. One that aborts requests ends those that the update waits for at once."""
        deferred = self.defer(lane, call)
        if deferred and aborts:
            self._loop.abort_all(lane)
        return deferred

    def deferred_requests(self, lane: Lane) -> int:
        """The number of deferred requests of the lane. May be called from any thread."""
        pending = self._pending.get(lane)
        # list(): the loop's thread may change the dict meanwhile.
        return 0 if pending is None else sum(isinstance(message, Submit) for message in list(pending.deferred.values()))

    def drop(self, key: int) -> bool:
        """Remove a deferred request. False if none has this key."""
        return any(pending.deferred.pop(key, None) is not None for pending in self._pending.values())

    def update(self, lane: Lane, call: Call, kind: type[UpdateArguments]) -> None:
        """Load new weights. The call is answered when they are applied, or at once if they can't be used."""
        arguments = msgspec.convert(call.arguments, kind)
        if arguments.hold and self.updates(lane):  # two that hold one replica each would wait for one another
            raise RequestError(f"Another update of {lane.served.name} is being made; try again.", status=409)
        if self._defer_call(lane, call, arguments.abort_all_requests):
            return
        if 0 < arguments.update_number <= lane.served.update_number:
            if arguments.hold:
                raise RequestError(f"Another update of {lane.served.name} was made meanwhile; try again.", status=409)
            self._answer(call.key, arguments, True, "The model has these weights, or later ones.")
            return
        if self._load_update is None:
            raise RequestError("This engine's weights can't be updated.")
        weights = repr(arguments.model_path) if isinstance(arguments, UpdateWeights) else "tensors that were sent"
        with self._loop.long_work(f"loading {weights} into {lane.served.name!r}"):
            try:
                update = self._load_update(lane, arguments)
            except UpdateRefused as refused:
                log.warning("%s keeps its weights. %s", lane.served.name, refused)
                self._answer(call.key, arguments, False, str(refused))
                return
        update_number = arguments.update_number or lane.served.update_number + 1
        update = replace(
            update, served=msgspec.structs.replace(update.served, update_number=update_number, label_number=0)
        )
        self._pending[lane] = PendingUpdate(update, call.key, arguments, arguments.hold)
        if arguments.hold:
            self._answer(call.key, arguments, True, "The weights are loaded, and wait for commit_update.")
        elif arguments.abort_all_requests:
            self._loop.abort_all(lane)

    def commit(self, lane: Lane, call: Call) -> None:
        """Apply the update that is held. The call is answered when it is applied; RequestError 409 if none is held."""
        pending = self._holding(lane, msgspec.convert(call.arguments, EndHold).hold)
        pending.hold, pending.call = "", call.key
        if pending.arguments.abort_all_requests:
            self._loop.abort_all(lane)

    def cancel(self, lane: Lane, call: Call) -> None:
        """Drop the update that is held, and handle the messages that it deferred. RequestError 409 if none is held."""
        self._holding(lane, msgspec.convert(call.arguments, EndHold).hold)
        self._discard(lane)
        self._loop.send([Answer(call.key, True)])

    def _holding(self, lane: Lane, token: str) -> PendingUpdate:
        pending = self._pending.get(lane)
        if pending is None or not pending.hold or pending.hold != token:
            raise RequestError(f"This update of {lane.served.name} doesn't wait to be committed.", status=409)
        return pending

    def _discard(self, lane: Lane) -> None:
        """Free the weights that the lane holds, and handle the messages that waited for them."""
        pending = self._pending.pop(lane)
        for stage in pending.update.stages.values():
            stage.close()
        deferred = pending.deferred
        del pending
        collect_garbage()
        for message in deferred.values():
            self._loop.handle(message)

    def update_version(self, lane: Lane, call: Call) -> None:
        """Give the weights another label, by default after aborting all requests."""
        arguments = msgspec.convert(call.arguments, UpdateVersion)
        if self._defer_call(lane, call, arguments.abort_all_requests):
            return
        version, number = arguments.new_version, arguments.label_number or lane.served.label_number + 1
        answer = {"success": True, "message": f"Weight version updated to {version}", "new_version": version}
        if number <= lane.served.label_number:
            self._loop.send([Answer(call.key, answer)])
            return
        if arguments.abort_all_requests:
            self._loop.abort_all(lane)
        if not lane.served.weights_sent:  # a restarted engine loads the folder's weights, which have their own label
            lane.settings = msgspec.structs.replace(lane.settings, weight_version=version)
        lane.served = msgspec.structs.replace(lane.served, weight_version=version, label_number=number)
        self.send_models()
        self._loop.send([Answer(call.key, answer)])

    def tensor_limit(self, lane: Lane, call: Call) -> None:
        """The answer is the limit on the size of a safetensors file with all tensors of the model, in bytes."""
        assert lane.candidate is not None
        numbers = sum(shape.numel() for shape in lane.candidate.plan.shapes.values())
        self._loop.send([Answer(call.key, MAX_NUMBER_BYTES * numbers + MAX_HEADER)])

    def read_tensor(self, lane: Lane, call: Call) -> None:
        """The answer is the first rows of a tensor, as nested lists. RequestError when it is unknown or too large."""
        arguments = msgspec.convert(call.arguments, ReadWeights)
        if "weights" in lane.released:
            raise RequestError("The weights are released; call /resume_memory_occupation first.")
        first_row = lane.model.tensor(arguments.name, 1)
        if first_row is None:
            raise RequestError("Get parameter by name failed", param="name")
        # Reading unpacks packed matrices, so read at most one row more than may be sent.
        most_rows = MAX_NUMBERS // max(1, first_row.numel()) + 1
        tensor = lane.model.tensor(arguments.name, min(max(arguments.truncate_size, 0), most_rows))
        if tensor.numel() > MAX_NUMBERS:
            raise RequestError(
                f"truncate_size {arguments.truncate_size} makes too many numbers of {arguments.name}; "
                f"at most {MAX_NUMBERS} are sent at once, {most_rows - 1} rows.",
                param="truncate_size",
            )
        self._loop.send([Answer(call.key, tensor.float().tolist())])

    def apply_loaded(self) -> None:
        """Apply loaded weights to the lanes that are idle or halted, then handle the messages that were deferred.

        Those that were held for too long are dropped.
        """
        now = time.monotonic()
        for lane in [lane for lane, one in self._pending.items() if one.hold and now - one.held_since > HOLD_SECONDS]:
            log.error("%s keeps its weights: new ones weren't committed in %g s", lane.served.name, HOLD_SECONDS)
            self._discard(lane)
        for lane in [lane for lane in self._pending if lane.halted or not lane.busy]:
            if self._pending[lane].hold:
                continue
            pending = self._pending.pop(lane)
            new, arguments = pending.update.served, pending.arguments
            paused = lane.scheduler.running + lane.scheduler.waiting
            last_steps = lane.apply_update(pending.update)
            collect_garbage()
            lane.runner.capture(lane.served.name)  # now that the old weights are freed
            self.send_models()
            self._loop.report(lane, last_steps)
            if isinstance(arguments, UpdateWeights):
                log.info("%s: updated to the weights of %s", new.name, new.model_path)
            else:
                log.info("%s: updated to tensors that were sent; a restart of the engine loses them", new.name)
            message = WEIGHTS_UPDATED if isinstance(arguments, UpdateWeights) else TENSORS_UPDATED
            if arguments.weight_version is not None:
                message += f" Weight version updated to {arguments.weight_version}."
            self._answer(pending.call, arguments, True, message, paused)
            for deferred in pending.deferred.values():
                self._loop.handle(deferred)

    def _answer(self, call: int, arguments: UpdateArguments, success: bool, message: str, paused: int = 0) -> None:
        answer: dict[str, Any] = {"success": success, "message": message}
        if isinstance(arguments, UpdateWeights):  # SGLang's reply to an update from tensors has no number
            answer["num_paused_requests"] = paused
        self._loop.send([Answer(call, answer)])

    def send_models(self) -> None:
        """Send the front the current state of all lanes. Called before the answer to the call that changed them."""
        lanes = self._loop.lanes
        self._loop.index_names()
        settings = [lane.settings.table() for lane in lanes]
        changed = ModelsChanged([lane.served for lane in lanes], settings, [lane.paused for lane in lanes])
        self._loop.send([changed, self._loop.heartbeat()])  # the heartbeat's loads are by model name


def collect_garbage() -> None:
    """Free models that are no longer used. Their modules form reference cycles, so reference counting doesn't.

    Models that were loaded at start-up may be frozen (exempt from garbage collection), so this unfreezes first.
    """
    frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if frozen:
        gc.freeze()
