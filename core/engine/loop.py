"""The engine loop: receive messages, schedule, run a pass, report its results. Its thread owns lanes and models."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from trunkline.core.engine.control.maintenance import AfterPass, Maintenance
from trunkline.core.engine.control.occupation import Occupation
from trunkline.core.engine.control.pass_log import PassLog
from trunkline.core.engine.control.pause import Pauser
from trunkline.core.engine.control.profile import Profiles
from trunkline.core.engine.control.updates import LoadUpdate, WeightUpdates
from trunkline.core.errors import RequestError
from trunkline.core.types import Request, Step

from .admission.preparation import Preparations
from .admission.submission import make_request
from .channel import Channel
from .lane import Lane
from .messages import (
    ABORTED,
    ABORTED_WAITING,
    Abort,
    Answer,
    Call,
    Heartbeat,
    Progress,
    Started,
    Stop,
    Submit,
    as_wire,
)
from .pass_record import PassRecord
from .pipeline import Pipeline
from .scheduling.batch import Batch
from .weight_update import WeightUpdate

BEAT_SECONDS = 1.0


class EngineLoop:
    """Serves requests on its lanes until the front sends ``Stop`` or disconnects."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        channel: Channel,
        controls: Mapping[str, Callable[..., Any]] | None = None,
        load_update: LoadUpdate | None = None,
        record: PassRecord | None = None,
        log_interval: int = 0,
    ) -> None:
        """``controls``: those of plugins. ``log_interval``: passes, 0 = no lines about passes."""
        self.lanes = list(lanes)
        self.channel = channel
        self.requests: dict[int, tuple[Lane, Request]] = {}
        self.pipeline = Pipeline(self.lanes, self.announce, self._finish)
        self.preparations = Preparations(channel.wake)
        self.passes = 0
        self.after_pass: list[AfterPass] = [PassLog(log_interval).after_pass] if log_interval else []
        self.updates = WeightUpdates(self, load_update)
        self._core_controls = {
            "probe": self._probe,
            **Maintenance(self).controls,
            **Profiles(self).controls,
            **self.updates.controls,
            **Pauser(self, self.updates.send_models).controls,
            **Occupation(self).controls,
        }
        self._plugin_controls = dict(controls or {})
        self._lanes_by_name: dict[str, Lane] = {}
        self._probes: dict[int, int] = {}  # key of a health probe's request -> key of the call that waits for it
        self._busy_since = 0.0  # time.monotonic() at the start of the running pass or control; 0 while waiting for work
        self._long_work = ""  # its description, see long_work
        self._note = (record or PassRecord()).note
        self._stopping = threading.Event()  # ends the heartbeat's thread, too, which would keep the models in memory
        self._encoder = msgspec.msgpack.Encoder()
        self.index_names()
        for lane in self.lanes:
            lane.note = self._note

    def index_names(self) -> None:
        """Index the lanes by name and alias; called again when a weight update may have renamed a lane."""
        self._lanes_by_name = {name: lane for lane in self.lanes for name in (lane.served.name, *lane.served.aliases)}

    def run(self) -> None:
        """Call :meth:`turn` until stopped; a thread sends heartbeats. What it raises is a bug: the process ends."""
        threading.Thread(target=self._send_heartbeats, name="trunkline-beat", daemon=True).start()
        for lane in self.lanes:
            lane.runner.device.enter_thread()
        try:
            while not self._stopping.is_set():
                self.turn()
        finally:
            self._stopping.set()
            served: list[Lane | WeightUpdate] = [*self.lanes, *self.updates.loaded]
            for stage in [stage for each in served for stage in each.stages.values()]:
                stage.close()
            self.admit_prepared()  # answers requests that wait for a stage
            self.channel.close()

    def turn(self) -> None:
        """Receive messages, then schedule and start a batch, and collect and report the one before it."""
        self.receive()
        self.admit_prepared()
        self.updates.apply_loaded()
        if not self.pipeline.advance():
            self._note([])
            self._busy_since = 0.0

    # -- inbound -----------------------------------------------------------------------------

    def receive(self) -> None:
        """Handle all messages that have arrived. Blocks only while there is no work."""
        busy = self.updates.pending or self.pipeline.busy
        messages = self.channel.receive(wait=not busy and not self._stopping.is_set())
        self._busy_since = time.monotonic()  # the watchdog covers controls and admissions, too
        if self.updates.pending or any(isinstance(message, Call) for message in messages):
            self.pipeline.drain()
        for message in messages:
            self.handle(message)

    def send(self, messages: list[Any]) -> None:
        """Send messages to the front."""
        self.channel.send(messages)

    def handle(self, message: Any) -> None:
        """Handle a message of the front. None means that it disconnected."""
        if message is None or isinstance(message, Stop):
            self._stopping.set()
        elif isinstance(message, Submit):
            self._note([message.key])
            self._submit(message)
        elif isinstance(message, Abort):
            self._abort(message.key)
        elif isinstance(message, Call):
            self._note([message.key])
            self._call(message)

    def _submit(self, message: Submit) -> None:
        try:
            lane = self._lane(message.model)
            if self.updates.defer(lane, message):
                return
            request = make_request(lane, message)
            if self.preparations.start(lane, request, message):
                self.requests[request.key] = (lane, request)
            else:
                self._admit(lane, request)
        except Exception as error:
            self.channel.send([Progress(message.key, [], error=as_wire(error))])

    def admit_prepared(self) -> None:
        """Admit the requests whose preparation has ended."""
        for done in self.preparations.take_ended():
            lane, request = done.lane, done.request
            if self.requests.pop(request.key, None) is None:
                continue  # it was aborted
            if done.outdated or self.updates.updates(lane):
                self._submit(done.message)
                continue
            self._note([request.key])
            try:
                self._admit(lane, request)
            except Exception as error:
                self.channel.send([Progress(request.key, [], error=as_wire(error))])

    def _admit(self, lane: Lane, request: Request) -> None:
        lane.admit(request)
        self.requests[request.key] = (lane, request)

    def _abort(self, key: int) -> None:
        entry = self.requests.pop(key, None)
        if entry is None:
            if self.updates.drop(key):
                self.channel.send([Progress(key, [], finish=ABORTED_WAITING)])
            return  # it ended before the message arrived
        lane, request = entry
        self.preparations.cancel(key)
        lane.end(request)
        finish = ABORTED if request.started else ABORTED_WAITING
        self._send_last(request, Progress(key, [], finish=finish, cached=request.cached))

    def abort_all(self, lane: Lane, *, probes_only: bool = False) -> None:
        """Abort the lane's requests, which answer with their output so far. ``probes_only``: only health probes."""
        for key in [key for key, (owner, _) in self.requests.items() if owner is lane and (key < 0 or not probes_only)]:
            self._abort(key)

    def _call(self, message: Call) -> None:
        try:
            lane = self._lane(message.model)
            if (control := self._core_controls.get(message.control)) is not None:
                control(lane, message)
            elif message.control in self._plugin_controls:
                answer = self._plugin_controls[message.control](lane.model, **message.arguments)
                self.channel.send([Answer(message.key, answer)])
            else:
                raise RequestError(f"There is no control named {message.control!r}.", status=404)
        except Exception as error:
            self.channel.send([Answer(message.key, error=as_wire(error))])

    def _probe(self, lane: Lane, call: Call) -> None:
        """Run the smallest request of the lane's first task. The call is answered when it ends, or at once by a halted
        lane, which is healthy if the loop is."""
        if lane.halted:
            self.channel.send([Answer(call.key, {"type": "halted"})])
            return
        request = next(iter(lane.stages.values())).probe(key=-call.key)
        self._admit(lane, request)
        self._probes[request.key] = call.key

    def _lane(self, name: str) -> Lane:
        if not name:
            return self.lanes[0]
        lane = self._lanes_by_name.get(name)
        if lane is None:
            names = ", ".join(self._lanes_by_name)
            raise RequestError(f"There is no model named {name!r}; loaded: {names}.", param="model")
        return lane

    # -- outbound ----------------------------------------------------------------------------

    def announce(self, started: Sequence[Request]) -> None:
        """Send the front the requests that left the waiting queue with this pass."""
        messages = [Started(request.key, request.cached) for request in started if request.key >= 0]
        if messages:
            self.channel.send(messages)

    def _finish(self, lane: Lane, batch: Batch, steps: list[Step]) -> None:
        """A batch was collected."""
        self.report(lane, steps)
        for callback in tuple(self.after_pass):  # a copy: a callback may remove itself
            callback(lane, batch, steps)
        self.passes += 1

    def report(self, lane: Lane, steps: Sequence[Step]) -> None:
        """Send the front the steps of a pass, and remove the requests that ended."""
        messages: list[Any] = []
        for step in steps:
            progress = self._progress(step)
            if progress.finish is not None or progress.error is not None:
                self.requests.pop(step.request.key, None)
                if step.request.key < 0:
                    self._send_last(step.request, progress)
            if step.request.key >= 0:
                messages.append(progress)
        if messages:
            self.channel.send(messages)

    def _progress(self, step: Step) -> Progress:
        error = None if step.error is None else as_wire(step.error)
        data = None if step.data is None else self._encoder.encode(step.data)
        return Progress(step.request.key, list(step.tokens), data, step.finish, error, step.request.cached)

    def _send_last(self, request: Request, progress: Progress) -> None:
        """Send the last message about a request; for a health probe, the answer to its call."""
        call = self._probes.pop(request.key, None)
        if call is None:
            self.channel.send([progress])
        else:
            self.channel.send([Answer(call, progress.finish, error=progress.error)])

    @contextmanager
    def long_work(self, description: str) -> Iterator[None]:
        """Announce work that may take longer than the watchdog allows for a pass."""
        self._busy_since, self._long_work = time.monotonic(), description
        self.channel.send([self.heartbeat()])
        try:
            yield
        finally:
            # In this order: the limit for a pass applies as soon as _long_work is empty.
            self._busy_since = time.monotonic()
            self._long_work = ""
            self.channel.send([self.heartbeat()])

    def _send_heartbeats(self) -> None:
        while not self._stopping.is_set():
            self.channel.send([self.heartbeat()])
            if self.updates.held:
                self.channel.wake()  # updates that are held for too long are dropped
            self._stopping.wait(BEAT_SECONDS)

    def heartbeat(self) -> Heartbeat:
        """The current state of the loop. May be called from any thread."""
        work, since = self._long_work, self._busy_since  # in this order, see long_work
        return Heartbeat(
            age=time.monotonic() - since if since else 0.0,
            loads=[lane.current_load(self.not_admitted(lane)) for lane in self.lanes],
            work=work,
        )

    def not_admitted(self, lane: Lane) -> int:
        """The number of the lane's requests that its scheduler doesn't have yet."""
        return self.updates.deferred_requests(lane) + self.preparations.count(lane)
