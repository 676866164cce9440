"""Runs a stage on given hidden rows, as the engine does around a forward pass."""

from __future__ import annotations

import torch

from trunkline.core.engine.device.cpu import CpuDevice
from trunkline.core.types import Launched, Part, Stage, Step


def launch_stage(stage: Stage, part: Part, hidden: torch.Tensor) -> Launched:
    """Prepare a part and launch it with its ``hidden`` rows, ``[R, hidden_size]``, on the CPU."""
    stage.prepare(part)
    part.tensors = CpuDevice().upload(part.arrays)
    return stage.launch(part, hidden)


def run_stage(stage: Stage, part: Part, hidden: torch.Tensor) -> list[Step]:
    """The steps of a part with its ``hidden`` rows, ``[R, hidden_size]``, on the CPU."""
    launched = launch_stage(stage, part, hidden)
    ids = {} if launched.next_ids is None else {"next_ids": launched.next_ids}
    return list(stage.collect(part, launched.tensors | ids))
