"""What a front and a replica exchange besides the engine's messages. All is msgpack, and comes in the order sent."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from trunkline.core.engine.messages import Abort, Answer, Call, Heartbeat, Progress, Ready, Started, Submit


class Address(Struct, array_like=True):
    """Where a replica takes one connection. ``ticket``: 32 random bytes that only the front knows."""

    host: str
    port: int
    ticket: bytes


class Hello(Struct, tag=True, array_like=True):
    """The first message of a front."""

    ticket: bytes


class State(Struct, tag=True, array_like=True):
    """The first message of a replica, sent again when something of it has changed.

    ``up``: the engine takes requests. ``ready``: what it serves; None until it has started for the first time.
    """

    up: bool
    healthy: bool
    restarts: int
    ready: Ready | None


class Failure(Struct, tag=True, array_like=True):
    """Requests and calls ended without a result, because the engine was lost or isn't there.

    ``message``: for the client. ``running``: those of the ``keys`` that were in the pass that the engine didn't
    survive.
    """

    keys: list[int]
    message: str
    running: list[int] = []


class NeedFile(Struct, tag=True, array_like=True):
    """A replica that can't read the file that the call ``key`` names asks for its content."""

    key: int


class FilePart(Struct, tag=True, array_like=True):
    """The next part of that file; an empty one is the end."""

    key: int
    data: bytes


ToReplica = Hello | Submit | Abort | Call | FilePart
ToFront = State | Heartbeat | Started | Progress | Answer | Failure | NeedFile

encode_address = msgspec.msgpack.Encoder().encode
decode_address = msgspec.msgpack.Decoder(Address).decode
decode_for_replica = msgspec.msgpack.Decoder(list[ToReplica]).decode
decode_for_front = msgspec.msgpack.Decoder(list[ToFront]).decode
