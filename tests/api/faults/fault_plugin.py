"""A plugin that makes the engine fail on command. It is installed for the servers of the fault matrix only.

``POST /fault`` arms a fault in the engine, where it takes effect the next time that its point in the code is reached.
The watchdog's limits are shorter than those of users, so that a stopped engine is replaced within seconds.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litestar import Request, Response, post
from msgspec import Struct

from trunkline.core.client import supervisor
from trunkline.core.hookspecs import hookimpl
from trunkline.core.server.api import json_response, read_body

RAISES = (3, 3, 4, 4, 3, 3)  # token ids: a pass over a prompt with these raises, each time
KILLS = (4, 4, 3, 3, 4, 4)  # a pass over a prompt with these kills the process, as the kernel does without memory
WATCHED = "dropped-"  # prefix of request ids whose admission and release are reported
PACKED_BEFORE = 3  # matrices of the new model that are packed before the fault "pack"
TENSORS_BEFORE = 5  # tensors of the new model that are read before the fault "read"


@dataclass
class Faults:
    """What is armed in this process, by point; and what happened since its start.

    ``left``: how often the point is still to fail. ``admitted``: ids of requests. ``released``: their number of passes
    at the release.
    """

    errors: dict[str, str] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    fired: int = 0
    passes: int = 0
    resets: int = 0
    admitted: list[str] = field(default_factory=list)
    released: dict[str, int] = field(default_factory=dict)

    def take(self, point: str) -> bool:
        """Whether a fault is armed at this point; it is counted as having happened."""
        armed = self.left.get(point, 0) > 0
        if armed:
            self.left[point] -= 1
            self.fired += 1
        return armed

    def reach(self, point: str) -> None:
        """Fail if a fault is armed at this point."""
        if self.take(point):
            fail(self.errors[point])


faults = Faults()


def fail(error: str) -> None:
    """Fail in the way that ``error`` names. With ``:FILE`` behind it, only the first of several processes fails."""
    import torch

    error, _, file = error.partition(":")
    if file and not is_first(file):
        return
    if error == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if error == "hang":
        time.sleep(600)
    if error == "allocate":
        torch.empty(1 << 30, dtype=torch.uint8).fill_(1)  # more than the process may have
        raise AssertionError("the memory limit has no effect")
    raise {"RuntimeError": RuntimeError, "MemoryError": MemoryError, "OutOfMemoryError": torch.OutOfMemoryError}[error](
        f"injected {error}"
    )


def is_first(file: str) -> bool:
    """Whether no other process has made this file, which is made now."""
    try:
        Path(file).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def before(owner: Any, name: str, action: Callable[..., None]) -> None:
    """Call ``action`` before each call of a function of a class or module, with the same arguments."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        action(*arguments, **keywords)
        return original(*arguments, **keywords)

    setattr(owner, name, wrapper)


def prepare_engine() -> None:
    """Add the points at which the engine can be made to fail."""
    import numpy as np

    from trunkline.core.engine.control import update_loader
    from trunkline.core.engine.device.cpu import CpuDevice
    from trunkline.core.engine.lane import Lane
    from trunkline.core.model.packed import PackedModel
    from trunkline.kernels.linear import PackedLinear
    from trunkline.plugins.generation.stage import GenerationStage

    memory = CpuDevice.memory
    patterns = {np.array(RAISES, np.int64).tobytes(): "RuntimeError", np.array(KILLS, np.int64).tobytes(): "killed"}

    def on_pass(model: Any, input_ids: Any, *_: Any, **__: Any) -> None:
        faults.passes += 1
        ids = input_ids.numpy().tobytes()
        for pattern, error in patterns.items():
            if pattern in ids:
                fail(error)
        faults.reach("pass")

    def on_pack(*_: Any, **__: Any) -> None:
        if faults.left.get("pack", 0) > 1:
            faults.left["pack"] -= 1
        else:
            faults.reach("pack")

    def on_reset(*_: Any) -> None:
        faults.resets += 1

    def on_admit(stage: Any, request: Any) -> None:
        if request.rid.startswith(WATCHED):
            faults.admitted.append(request.rid)

    def on_release(stage: Any, request: Any) -> None:
        if request.rid.startswith(WATCHED):
            faults.released[request.rid] = faults.passes

    before(PackedModel, "forward", on_pass)
    before(PackedLinear, "__init__", on_pack)
    CpuDevice.memory = lambda device: (  # type: ignore[method-assign]
        memory(device)._replace(available=0) if faults.take("memory") else memory(device)
    )
    before(update_loader, "WeightUpdate", lambda *_, **__: faults.reach("last step"))
    before(Lane, "apply_update", lambda *_: faults.reach("swap"))
    before(GenerationStage, "reset", on_reset)
    before(GenerationStage, "admit", on_admit)
    before(GenerationStage, "release", on_release)


def arm(model: Any, point: str, error: str, count: int) -> dict[str, Any]:
    """The control: arm a fault, or with point "" none. The answer has what happened so far."""
    if point:
        faults.errors[point] = error
        faults.left[point] = count + PACKED_BEFORE * (point == "pack")
    names = ("fired", "passes", "resets", "admitted", "released")
    return {name: getattr(faults, name) for name in names}


@hookimpl
def trunkline_settings() -> None:
    """The first hook that is called: shorten the watchdog's limits, and let crashes be repeated without end."""
    supervisor.WatchdogLimits = functools.partial(  # type: ignore[misc,assignment]
        supervisor.WatchdogLimits, unhealthy=2.0, silent=10.0, window=0.1
    )


@hookimpl
def trunkline_controls() -> dict[str, Callable[..., Any]]:
    prepare_engine()
    return {"fault": arm}


@hookimpl(tryfirst=True)
def trunkline_weights(source: Any) -> Iterable[tuple[str, Any]] | None:
    """A stream that fails in its middle, if that is armed."""
    if not faults.left.get("read"):
        return None
    from trunkline.core.model.sources import weights

    def stream() -> Iterator[tuple[str, Any]]:
        for number, pair in enumerate(weights.stream(source.path)):
            if number == TENSORS_BEFORE:
                faults.reach("read")
            yield pair

    return stream()


class Body(Struct):
    """Of ``POST /fault``."""

    point: str = ""
    error: str = ""
    count: int = 1


@hookimpl
def trunkline_routes(engine: Any, settings: Any) -> list[Any]:
    @post("/fault", opt={"scope": "infer", "body": Body}, status_code=200)
    async def fault(request: Request[Any, Any, Any]) -> Response[Any]:
        body = await read_body(request, Body)
        return json_response(await engine.call("fault", point=body.point, error=body.error, count=body.count))

    return [fault]
