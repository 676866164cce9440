"""The engine process: ``python -m trunkline.core.engine.process FD``.

``FD`` is the inherited end of a socketpair. The first frame from the front is ``{"config": …, "record": …,
"paused": …}``: the settings, the descriptor of the pass record, -1 for none, and which models were paused when the
engine before this one was lost. From then on both sides exchange the frames of :mod:`.messages`.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from trunkline.core.config import Config
from trunkline.core.errors import TrunklineError
from trunkline.core.guard import forbid_pickle
from trunkline.core.host import Host
from trunkline.core.logs import configure_logging

from .channel import SocketChannel, read_frame
from .messages import Failed, Loading, frame

if TYPE_CHECKING:
    from .startup import Started

log = logging.getLogger("trunkline.engine")


def main() -> int:
    """Serve until the front stops us or goes away. Exit status 1: could not start or broke."""
    faulthandler.enable()
    forbid_pickle()
    # The front decides when to stop; a Ctrl-C in the terminal reaches both processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    first = read_frame(sock)
    if first is None:
        return 0
    orders = msgspec.msgpack.decode(first)
    try:
        host, config = configure(orders["config"])
        configure_logging(config.server.log_level)
        started = start(config, host, announce=lambda what: sock.sendall(frame([Loading(what)])))
    except BaseException as error:  # of a plugin, it may be SystemExit
        if not isinstance(error, TrunklineError):
            log.exception("the engine could not start")
        sock.sendall(frame([Failed(str(error) or type(error).__name__)]))
        return 1
    sock.sendall(frame([started.ready]))
    gc.freeze()  # models and modules stay: no collection has to walk over them, nor the last one at exit
    from trunkline.core.engine.control.renew import Renewer

    from .loop import EngineLoop
    from .pass_record import PassRecord

    try:
        renewer = Renewer(started.lanes, config, host)
        record = PassRecord(orders.get("record", -1))
        for lane, paused in zip(started.lanes, orders.get("paused", []), strict=False):
            lane.paused = paused
        EngineLoop(started.lanes, SocketChannel(sock), started.controls, renewer, record).run()
    except Exception:
        log.exception("the engine broke")
        return 1
    return 0


def configure(raw: dict[str, Any]) -> tuple[Host, Config]:
    """The plugin host and the settings that the front has decided on."""
    selection = raw.get("plugins", {})
    host = Host.load(only=selection.get("only"), without=selection.get("without") or [])
    return host, Config.load(raw, host)


def start(config: Config, host: Host, announce: Callable[[str], None]) -> Started:
    """Import what computes, then load the models.

    Meanwhile the garbage collector rests, and then takes what was imported for granted: to walk over
    the modules of torch and transformers again and again would take a fifth of the start.
    """
    clock = time.perf_counter()
    gc.disable()
    from .startup import build

    gc.freeze()
    gc.enable()
    imports = time.perf_counter() - clock
    started = build(config, host, announce)
    started.ready.seconds = {"imports": imports, **started.ready.seconds}
    return started


if __name__ == "__main__":
    sys.exit(main())
