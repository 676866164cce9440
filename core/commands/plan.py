"""``trunkline plan``: shows the memory that models would take, without loading their weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from trunkline.core.config import Config
from trunkline.core.errors import ConfigError, ModelError
from trunkline.core.host import Host

from .flags import Flag
from .serve import SEGMENTS, StartupSelection, add_models_command, all_flags, configure

if TYPE_CHECKING:
    import torch

    from trunkline.core.engine.device.base import Memory
    from trunkline.core.engine.memory import MemoryPlan

JSON = Flag("", "json", ("--json",), bool, "Print JSON; sizes are in bytes.")
DEVICE_MEMORY = Flag(
    "",
    "device_memory",
    ("--device-memory",),
    str,
    "Plan for a device with this memory, all of it free, for example 80GiB: a GPU that needn't be there, or with "
    "--device cpu a CPU.",
)
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", re.IGNORECASE)
UNITS = "KMGT"


def add_plan(app: typer.Typer, host: Host, selection: StartupSelection) -> None:
    """Add the command ``plan``, which takes the flags of ``serve`` and two of its own."""
    flags = [*all_flags(host), JSON, DEVICE_MEMORY]

    def plan(ctx: typer.Context, **_: Any) -> None:
        segments: Sequence[Mapping[str, Any]] = ctx.meta[SEGMENTS]
        given = {name: value for segment in segments for name, value in segment.items()}
        size = given.get(DEVICE_MEMORY.field)
        memory = None if size is None else parse_size(size)
        planned = plan_memory(configure(segments, flags, selection, host), host, memory)
        print(json.dumps(as_json(planned), indent=2) if given.get(JSON.field) else "\n".join(planned.lines()))
        if planned.problem:
            raise ModelError(planned.problem)

    about = "Show how much memory models take, without loading them. The exit status is 1 if they don't fit."
    add_models_command(app, plan, flags, about)


def plan_memory(config: Config, host: Host, device_memory: int | None) -> MemoryPlan:
    """The memory plan of all models of the configuration. ``device_memory``: bytes of a device that is only assumed."""
    from trunkline.core.engine.startup import plan_models

    device, memory = (
        find_device(config.engine.device)
        if device_memory is None
        else assume_device(config.engine.device, device_memory)
    )
    return plan_models(config, host, device, memory)


def find_device(name: str) -> tuple[torch.device, Memory]:
    """The device of ``--device``, and its memory. ModelError if it isn't there."""
    from trunkline.core.engine.device.choose import choose_device

    device = choose_device(name)
    return device.kind, device.memory()


def assume_device(name: str, memory: int) -> tuple[torch.device, Memory]:
    """A device with ``memory`` bytes, all of it free: a GPU, unless ``--device`` is "cpu"."""
    import torch

    from trunkline.core.engine.device.base import Memory

    return torch.device("cuda" if name == "auto" else name), Memory(memory, memory)


def as_json(plan: MemoryPlan) -> dict[str, Any]:
    """The plan as builtin types."""
    return {
        "device": str(plan.device),
        "total_bytes": plan.memory.total,
        "available_bytes": plan.memory.available,
        "limit_bytes": plan.limit,
        "weight_bytes": plan.weights,
        "kv_bytes": plan.pools,
        "activation_bytes": plan.activations,
        "fits": not plan.problem,
        "problem": plan.problem or None,
        "models": plan.rows(),
    }


def parse_size(text: str) -> int:
    """Bytes of a size such as "80GiB", "80GB" (of 1000³ bytes) or "85899345920". ConfigError for anything else."""
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"--device-memory {text}: give a number and a unit, such as 80GiB.")
    number, unit, binary = found.groups()
    power = 0 if unit is None else UNITS.index(unit.upper()) + 1
    return int(float(number) * (1024 if binary else 1000) ** power)
