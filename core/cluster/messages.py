"""What a front and a replica exchange besides the engine's messages: msgpack in bytes, which Ray needn't pickle.

All that a replica says is in its stream, in order. The result of a call to it says only how that ended.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from trunkline.core.engine.messages import Answer, Call, Heartbeat, Progress, Ready, Started, Submit


class State(Struct, tag=True, array_like=True):
    """The first message of a stream, and sent again when something of it has changed.

    ``up``: the engine takes requests. ``ready``: what it serves; None until it has started for the first time.
    """

    up: bool
    healthy: bool
    restarts: int
    ready: Ready | None


class Done(Struct, tag=True, array_like=True):
    """The last message about a request, or the answer to a call, is in the stream of this replica."""

    replica: str


class Failure(Struct, tag=True, array_like=True):
    """A request or call ended without one, because the engine was lost or isn't there.

    ``message``: for the client. ``running``: it was in the pass that the engine didn't survive. ``replica``: where it
    was, "" if that isn't known. ``silent``: the replica itself was lost, so what its engine ran isn't known.
    """

    message: str
    running: bool = False
    replica: str = ""
    silent: bool = False


Update = State | Heartbeat | Started | Progress | Answer

encode = msgspec.msgpack.Encoder().encode
decode_updates = msgspec.msgpack.Decoder(list[Update]).decode
decode_outcome = msgspec.msgpack.Decoder(Done | Failure).decode
decode_submit = msgspec.msgpack.Decoder(Submit).decode
decode_call = msgspec.msgpack.Decoder(Call).decode
