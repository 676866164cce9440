"""The messages between front and engine: msgpack frames over a socketpair, never pickle.

A frame is a 4-byte little-endian length and a msgpack array of messages. Params and results
are msgpack inside msgpack, which the task's code decodes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Raw, Struct, structs

from trunkline.core.errors import RequestError
from trunkline.core.types import ServedModel

log = logging.getLogger("trunkline.engine")

NOT_FOUND = "Failed to get weights iterator: {} (repository not found)."  # SGLang's text, which clients compare
MAX_FRAME = 256 << 20  # bytes; a longer frame means a broken peer
FAILED = "The request failed inside the engine; the server's log has the reason."
ABORTED: dict[str, Any] = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
ABORTED_WAITING: dict[str, Any] = {**ABORTED, "message": "Abort in waiting queue"}
"""The finish reasons of aborted requests, the second one of those that hadn't started."""


# front -> engine


class Submit(Struct, tag=True, array_like=True):
    """A :class:`Submission` on the wire: with the key, model and task that the client adds, its arrays as bytes and its
    params encoded. The engine makes a :class:`Request` of it."""

    key: int  # unique per front
    model: str
    task: str
    rid: str
    prompt: bytes  # int32 little-endian token ids
    params: Raw
    priority: int = 0
    salt: bytes = b""
    cacheable: bool = True  # False: neither reads nor fills the cache (health probes)
    second_at: int | None = None  # where the second text of a pair begins
    alone: bool = False  # compute it in forward passes of its own
    embeds: bytes = b""  # see Submission


class Abort(Struct, tag=True, array_like=True):
    key: int


class Call(Struct, tag=True, array_like=True):
    key: int
    control: str
    model: str  # "" = the primary
    arguments: dict[str, Any]
    replica: str = ""  # name of the one that it is for, if the transport has several


class Stop(Struct, tag=True, array_like=True):
    """Stop now, without finishing running requests: the front has drained, or stops without draining."""


# engine -> front


class Loading(Struct, tag=True, array_like=True):
    """A phase of start-up begins, or has done some of its steps; heartbeats come only after ``Ready``."""

    what: str
    done: int = 0  # steps
    steps: int = 0  # 0: the phase isn't divided


class Ready(Struct, tag=True, array_like=True):
    models: list[ServedModel]
    plan: list[dict[str, Any]]  # rows of the memory plan
    seconds: dict[str, float]  # start-up phases
    paused: list[bool] = []  # which models only collect requests

    def after(self, changed: ModelsChanged) -> Ready:
        """A copy with the models of ``changed``."""
        plan = [{**row, "model": model.name} for row, model in zip(self.plan, changed.models, strict=True)]
        return structs.replace(self, models=changed.models, plan=plan, paused=changed.paused)


class ModelsChanged(Struct, tag=True, array_like=True):
    """Weights, their label, or a pause were changed: the served models, and the ``[[models]]`` tables with which a
    restarted engine serves the same. ``paused``: which models only collect requests, in their order. ``keys``: the
    requests whose weights have another label now, None = all of these models."""

    models: list[ServedModel]
    settings: list[dict[str, Any]]
    paused: list[bool] = []
    keys: list[int] | None = None


class Failed(Struct, tag=True, array_like=True):
    """The engine can't start, or has failed; it exits after this message."""

    message: str


class Load(Struct, array_like=True):
    """The load of a model: its requests, free slots (including those of evictable prefixes), and slots.

    ``retracted``: how many of the waiting requests ran before. ``waiting_tokens``: of all that wait.
    """

    model: str
    waiting: int
    running: int
    retracted: int
    free_slots: int
    slots: int
    waiting_tokens: int = 0

    @property
    def used(self) -> int:
        """Slots that requests hold; cached prefixes that no request uses aren't counted."""
        return self.slots - self.free_slots


class Heartbeat(Struct, tag=True, array_like=True):
    """The heartbeat, sent once a second by a separate thread. ``age``: seconds since the running pass began, 0 when
    idle. ``work``: description of long work other than a pass (loading weights), "" if there is none; then ``age``
    counts from its beginning."""

    age: float
    loads: list[Load] = []
    work: str = ""


class Started(Struct, tag=True, array_like=True):
    """A request was scheduled for the first time: it has left the waiting queue."""

    key: int
    cached: int


class Progress(Struct, tag=True, array_like=True):
    """New results of one request since the last Progress. The last one has ``finish`` or ``error``.

    It is a :class:`Step` on the wire: the request is named by its key, data and error are encoded. Several unsent ones
    of a request are merged, see :class:`.channel.Outbox`.
    """

    key: int
    tokens: list[int]
    data: bytes | None = None  # the result as msgpack; Raw would not decode in a union
    finish: dict[str, Any] | None = None
    error: tuple[int, str, str | None] | None = None  # status, message, param
    cached: int = 0

    @property
    def last(self) -> bool:
        return self.finish is not None or self.error is not None

    @property
    def aborted(self) -> bool:
        return self.finish is not None and self.finish.get("type") == "abort"


class Answer(Struct, tag=True, array_like=True):
    """Reply to a Call."""

    key: int
    value: Any = None
    error: tuple[int, str, str | None] | None = None


FrontMessage = Submit | Abort | Call | Stop
EngineMessage = Loading | Ready | ModelsChanged | Failed | Heartbeat | Started | Progress | Answer

encoder = msgspec.msgpack.Encoder()
front_decoder = msgspec.msgpack.Decoder(list[FrontMessage])
engine_decoder = msgspec.msgpack.Decoder(list[EngineMessage])


def frame(content: Any) -> bytes:
    """Length prefix and msgpack of a frame's content: a list of messages in all frames but the first."""
    body = encoder.encode(content)
    return len(body).to_bytes(4, "little") + body


def frames(messages: list[Any]) -> Iterator[bytes]:
    """The messages, divided into frames of at most ``MAX_FRAME`` bytes."""
    whole = frame(messages)
    if len(whole) <= MAX_FRAME or len(messages) < 2:
        yield whole
        return
    middle = len(messages) // 2
    yield from frames(messages[:middle])
    yield from frames(messages[middle:])


def as_wire(error: Exception) -> tuple[int, str, str | None]:
    """Status, message and field of an error for the client. Internal errors are logged; the client gets a generic
    500."""
    if isinstance(error, RequestError):
        return error.status, error.message, error.param
    if isinstance(error, msgspec.DecodeError):
        return 400, str(error), None
    log.error("request failed: %s", error, exc_info=error)
    return 500, FAILED, None
