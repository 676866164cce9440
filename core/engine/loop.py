"""The engine loop: receive, schedule, run, collect, report. One thread owns everything below it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec
import numpy as np

from trunkline.core.engine.control.maintenance import AfterPass, Maintenance
from trunkline.core.engine.control.occupation import Occupation
from trunkline.core.engine.control.pass_log import PassLog
from trunkline.core.engine.control.pause import Pauser
from trunkline.core.engine.control.profile import Profiles
from trunkline.core.engine.control.updates import Renew, Updates
from trunkline.core.errors import RequestError
from trunkline.core.types import Request, Step

from .embeds import content_salt, read_embeds
from .lane import Lane
from .messages import Abort, Answer, Beat, Call, Progress, Started, Stop, Submit, as_wire
from .pass_record import PassRecord

log = logging.getLogger("trunkline.engine")

BEAT_SECONDS = 1.0
ABORTED = {"type": "abort", "status_code": None, "err_type": None}


class Channel(Protocol):
    def receive(self, *, wait: bool) -> list[Any]: ...
    def send(self, messages: list[Any]) -> None: ...
    def close(self) -> None: ...


class EngineLoop:
    """Serves requests on its lanes until the front says stop or hangs up."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        channel: Channel,
        controls: Mapping[str, Callable[..., Any]] | None = None,
        renew: Renew | None = None,
        record: PassRecord | None = None,
        log_interval: int = 0,
    ) -> None:
        """``record``: where the requests that are worked on are noted. ``log_interval``: passes, 0 = no lines."""
        self.lanes = list(lanes)
        self.channel = channel
        self.requests: dict[int, tuple[Lane, Request]] = {}
        self.passes = 0
        self.after_pass: list[AfterPass] = [PassLog(log_interval).passed] if log_interval else []
        self.updates = Updates(self, renew)
        self._own = {
            "probe": self._probe,
            **Maintenance(self).controls,
            **Profiles(self).controls,
            **self.updates.controls,
            **Pauser(self, self.updates.changed).controls,
            **Occupation(self).controls,
        }
        self._controls = dict(controls or {})
        self._names: dict[str, Lane] = {}
        self._probes: dict[int, int] = {}  # request key -> key of the call that waits for it
        self._pass_began = 0.0  # time.monotonic() while there is work in hand, 0 while waiting for some
        self._work = ""  # what takes long, see long_work
        self._note = (record or PassRecord()).note
        self._stopping = False
        self._ended = threading.Event()  # the heartbeat's thread doesn't keep the models for the rest of its second
        self._encoder = msgspec.msgpack.Encoder()
        self.know_names()
        for lane in self.lanes:
            lane.note = self._note

    def know_names(self) -> None:
        """Look up what lanes are called; an update may have renamed one."""
        self._names = {name: lane for lane in self.lanes for name in (lane.served.name, *lane.served.aliases)}

    def run(self) -> None:
        """Turn until stopped; the heartbeat comes from a thread of its own.

        Whatever ``turn`` raises is a defect of the engine, whose state can't be trusted any more:
        it is passed on, for the process to end.
        """
        threading.Thread(target=self._beat, name="trunkline-beat", daemon=True).start()
        try:
            while not self._stopping:
                self.turn()
        finally:
            self._stopping = True
            self._ended.set()
            self.channel.close()

    def turn(self) -> None:
        """Receive, schedule, run, collect, report."""
        self.receive()
        self.updates.settle()
        lane = self.next_lane()
        batch = None if lane is None else lane.schedule()
        if lane is not None and batch is not None:
            self.announce(batch.started)
            steps = lane.run(batch)
            self.report(lane, steps)
            for look in (*self.after_pass,):  # one may leave
                look(lane, batch, steps)
            self.passes += 1
        self._note([])
        self._pass_began = 0.0

    # -- inbound -----------------------------------------------------------------------------

    def receive(self) -> None:
        """Handle everything that has arrived; block only when there is no work."""
        busy = self.updates.pending or any(lane.busy and not lane.halted for lane in self.lanes)
        messages = self.channel.receive(wait=not busy and not self._stopping)
        self._pass_began = time.monotonic()  # a control or a stage's admit may hang just as a forward pass
        for message in messages:
            self.handle(message)

    def send(self, messages: list[Any]) -> None:
        """Hand messages to the front."""
        self.channel.send(messages)

    def handle(self, message: Any) -> None:
        """What the front wants; None = it left."""
        if message is None or isinstance(message, Stop):
            self._stopping = True
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
            if self.updates.hold(lane, message):
                return
            stage = lane.stages.get(message.task)
            params = stage.decode_params(message.params) if stage else None  # without a stage it is refused
            prompt: list[int] = np.frombuffer(message.prompt, np.int32).tolist()
            embeds = read_embeds(message.embeds, len(prompt)) if message.embeds else None
            self._admit(lane, Request(
                key=message.key,
                rid=message.rid,
                task=message.task,
                params=params,
                tokens=prompt,
                prompt_len=len(prompt),
                priority=message.priority,
                namespace=lane.namespace(message.salt + content_salt(message.embeds)),
                cacheable=message.cacheable,
                second_at=message.second_at,
                alone=message.alone,
                embeds=embeds,
            ))  # fmt: skip
        except Exception as error:
            self.channel.send([Progress(message.key, [], error=as_wire(error))])

    def _admit(self, lane: Lane, request: Request) -> None:
        lane.admit(request)
        self.requests[request.key] = (lane, request)

    def _abort(self, key: int) -> None:
        entry = self.requests.pop(key, None)
        if entry is None:
            if self.updates.drop(key):
                self.channel.send([Progress(key, [], finish={**ABORTED, "message": "Abort in waiting queue"})])
            return  # it finished while the message was on its way
        lane, request = entry
        lane.end(request)
        message = "Aborted" if request.started else "Abort in waiting queue"
        self._settle(request, Progress(key, [], finish={**ABORTED, "message": message}, cached=request.cached))

    def abort_all(self, lane: Lane, *, probes_only: bool = False) -> None:
        """End the lane's requests; they answer with what they have. Or only health probes, which mustn't wait."""
        for key in [key for key, (owner, _) in self.requests.items() if owner is lane and (key < 0 or not probes_only)]:
            self._abort(key)

    def _call(self, message: Call) -> None:
        try:
            lane = self._lane(message.model)
            if (own := self._own.get(message.control)) is not None:
                own(lane, message)
            elif message.control in self._controls:
                answer = self._controls[message.control](lane.model, **message.arguments)
                self.channel.send([Answer(message.key, answer)])
            else:
                raise RequestError(f"There is no control named {message.control!r}.", status=404)
        except Exception as error:
            self.channel.send([Answer(message.key, error=as_wire(error))])

    def _probe(self, lane: Lane, call: Call) -> None:
        """Run the smallest request of the lane's first task; the call is answered when it ends.

        A lane that is halted on purpose is as healthy as the loop that answers.
        """
        if lane.halted:
            self.channel.send([Answer(call.key, {"type": "halted"})])
            return
        request = next(iter(lane.stages.values())).probe(key=-call.key)
        self._admit(lane, request)
        self._probes[request.key] = call.key

    def _lane(self, name: str) -> Lane:
        if not name:
            return self.lanes[0]
        if name not in self._names:
            raise RequestError(f"There is no model named {name!r}; loaded: {', '.join(self._names)}.", param="model")
        return self._names[name]

    # -- outbound ----------------------------------------------------------------------------

    def next_lane(self) -> Lane | None:
        """The busy lane that has had the least device time, of those that aren't halted.

        A lane that was idle starts level with the least of the others: neither a debt nor a
        credit is carried over, so a newcomer waits for one turn at most.
        """
        busy = [lane for lane in self.lanes if lane.busy and not lane.halted]
        if not busy:
            return None
        least = min(busy, key=lambda lane: lane.spent)
        for lane in self.lanes:
            lane.spent = max(lane.spent, least.spent)
        return least

    def announce(self, started: Sequence[Request]) -> None:
        """Tell the front which requests left the waiting queue with this pass."""
        messages = [Started(request.key, request.cached) for request in started if request.key >= 0]
        if messages:
            self.channel.send(messages)

    def report(self, lane: Lane, steps: Sequence[Step]) -> None:
        """Tell the front what a pass brought, and forget the requests that ended."""
        messages: list[Any] = []
        for step in steps:
            progress = self._progress(step)
            if progress.finish is not None or progress.error is not None:
                self.requests.pop(step.request.key, None)
                if step.request.key < 0:
                    self._settle(step.request, progress)
            if step.request.key >= 0:
                messages.append(progress)
        if messages:
            self.channel.send(messages)

    def _progress(self, step: Step) -> Progress:
        error = None if step.error is None else as_wire(step.error)
        data = None if step.data is None else self._encoder.encode(step.data)
        return Progress(step.request.key, list(step.tokens), data, step.finish, error, step.request.cached)

    def _settle(self, request: Request, progress: Progress) -> None:
        """Send the last word on a request: to its stream, or to the call that probed with it."""
        call = self._probes.pop(request.key, None)
        if call is None:
            self.channel.send([progress])
        else:
            self.channel.send([Answer(call, progress.finish, error=progress.error)])

    @contextmanager
    def long_work(self, what: str) -> Iterator[None]:
        """Around work that may take longer than the watchdog allows for a pass."""
        self._pass_began, self._work = time.monotonic(), what
        self.channel.send([self.pulse()])
        try:
            yield
        finally:
            self._pass_began = time.monotonic()  # before the work ends: the pass goes on, and its age counts again
            self._work = ""
            self.channel.send([self.pulse()])

    def _beat(self) -> None:
        while not self._stopping:
            self.channel.send([self.pulse()])
            self._ended.wait(BEAT_SECONDS)

    def pulse(self) -> Beat:
        """The heartbeat as it is now."""
        work, began = self._work, self._pass_began  # in this order, see long_work
        return Beat(
            passes=self.passes,
            age=time.monotonic() - began if began else 0.0,
            loads=[lane.load(self.updates.waiting(lane)) for lane in self.lanes],
            work=work,
        )
