"""The engine process: ``python -m trunkline.core.engine.process FD``.

``FD`` is the inherited end of a socketpair. The first frame from the front is ``{"config": …, "record": …, "paused": …,
"update_numbers": …}``: the settings, the descriptor of the pass record, -1 for none, and of the engine before this one,
which models were paused and the numbers of the weights that are in folders. From then on both sides exchange the frames
of :mod:`.messages`.
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
    from .startup import LoadedEngine

log = logging.getLogger("trunkline.engine")


def main() -> int:
    """Run the engine until the front stops it or exits. The exit status is 1 if it can't start or fails."""
    faulthandler.enable()
    forbid_pickle()
    # The front stops the engine, after it has drained. SIGINT may reach both processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=int(sys.argv[1]))
    first = read_frame(sock)
    if first is None:
        return 0
    start_options = msgspec.msgpack.decode(first)
    try:
        host, config = configure(start_options["config"])
        configure_logging(config.server.log_level)
        started = start(config, host, announce=lambda phase: sock.sendall(frame([phase])))
    except BaseException as error:  # a plugin may raise SystemExit
        if not isinstance(error, TrunklineError):
            log.exception("the engine could not start")
        sock.sendall(frame([Failed(str(error) or type(error).__name__)]))
        gc.unfreeze()  # or extension modules would report all objects that outlive them
        return 1
    for lane, update_number in zip(started.lanes, start_options.get("update_numbers", []), strict=False):
        lane.served = msgspec.structs.replace(lane.served, update_number=update_number)
    for lane, paused in zip(started.lanes, start_options.get("paused", []), strict=False):
        lane.paused = paused
    started.ready.models = [lane.served for lane in started.lanes]
    started.ready.paused = [lane.paused for lane in started.lanes]
    sock.sendall(frame([started.ready]))
    gc.freeze()  # exempts models and modules from garbage collection, which would scan them each time
    from trunkline.core.engine.control.update_loader import UpdateLoader

    from .loop import EngineLoop
    from .pass_record import PassRecord

    try:
        load_update = UpdateLoader(started.lanes, config, host)
        record = PassRecord(start_options.get("record", -1))
        interval = config.engine.decode_log_interval
        EngineLoop(started.lanes, SocketChannel(sock), started.controls, load_update, record, interval).run()
    except Exception:
        log.exception("the engine broke")
        return 1
    finally:
        gc.unfreeze()  # as above
    return 0


def configure(raw: dict[str, Any]) -> tuple[Host, Config]:
    """The plugin host and the settings, as the front has sent them."""
    selection = raw.get("plugins", {})
    host = Host.load(only=selection.get("only"), without=selection.get("without") or [])
    return host, Config.load(raw, host)


def start(config: Config, host: Host, announce: Callable[[Loading], None]) -> LoadedEngine:
    """Import torch and what depends on it, then load the models.

    Garbage collection is off during the imports, and ``gc.freeze`` exempts the imported modules from it: scanning the
    modules of torch and transformers repeatedly would take a fifth of the start-up time.
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
