"""The tables of plans, and how many splits the predicted times give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from trunkline.kernels.triton import cost, launch, plans

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [16, 32, 64, 80, 96, 128, 256])
def test_every_head_dim_has_plans(architecture: str, itemsize: int, width: int) -> None:
    decode, extend = plans.decode(architecture, width, itemsize), plans.extend(architecture, width, itemsize)
    assert decode.block_m >= 16 <= decode.block_n
    assert extend.block_m >= 16 <= extend.block_n
    assert decode.stages > 1, "a tile is requested while the one before is computed"


class Driver:
    def __init__(self, backend: str, arch: int | str) -> None:
        self.target = GPUTarget(backend, arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 8

    @property
    def utils(self) -> Any:
        return SimpleNamespace(get_device_properties=lambda device: {"multiprocessor_count": 50 + device})


@pytest.mark.parametrize(
    ("backend", "arch", "expected"),
    [
        ("cuda", 80, "sm_80"),
        ("cuda", 89, "sm_80"),
        ("cuda", 90, "sm_90"),
        ("cuda", 100, "sm_100"),
        ("cuda", 103, "sm_100"),
        ("cuda", 120, "sm_80"),
        ("hip", "gfx942", "gfx942"),
        ("hip", "gfx1100", "gfx942"),
    ],
)
def test_architectures(backend: str, arch: int | str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "driver", type("Drivers", (), {"active": Driver(backend, arch)}))
    assert launch.architecture() == expected


def splits(lengths: list[int], span: int = launch.LONGEST) -> int:
    """For 32 heads, 8 KV heads and a head dim of 128, in bfloat16."""
    work = cost.DecodeWork.of(np.array(lengths, np.int32), span, 32, 8, 512, 128)
    return cost.splits("sm_90", plans.decode("sm_90", 128, 2), work)


def test_splits_fill_the_gpu() -> None:
    """One long row is divided among all multiprocessors, be it alone or among short ones; full batches are not."""
    assert splits([32768]) * 8 > 132
    assert splits([32768] + [64] * 63) >= 4
    assert splits([4096] * 64) <= 2
    assert splits([100]) == 1
    assert splits([32768], span=100) == 1, "the window is what counts"


def test_a_smaller_gpu_has_fewer_splits() -> None:
    """Its programs fill it earlier; with the architecture's own number, the splits are the architecture's."""
    plan, work = plans.decode("sm_80", 128, 2), cost.DecodeWork(1, 32768, 32768, 32, 8, 512, 128)
    server, small = (cost.splits("sm_80", plan, work, multiprocessors=count) for count in (108, 20))
    assert small < server == cost.splits("sm_80", plan, work)


def test_multiprocessors_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "driver", type("Drivers", (), {"active": Driver("cuda", 89)}))
    assert launch.multiprocessors() == 58


def test_splits_are_bounded_by_keys_and_memory() -> None:
    plan = plans.decode("sm_90", 128, 2)
    assert splits([1000]) <= -(-1000 // plan.smallest_share)
    assert splits([131072] * 512) * 512 * 32 * 130 * 4 <= cost.SCRATCH_BYTES or splits([131072] * 512) == 1
    assert splits([2**20]) <= plan.splits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_predictions_are_above_the_floor(architecture: str) -> None:
    gpu, plan = cost.GPUS[architecture], plans.decode(architecture, 128, 2)
    for rows, length in ((1, 1024), (8, 4096), (64, 4096), (256, 1024)):
        work = cost.DecodeWork.of(np.full(rows, length, np.int32), launch.LONGEST, 32, 8, 512, 128)
        best = cost.splits(architecture, plan, work)
        seconds = cost.decode_seconds(gpu, plan, work, best)
        assert seconds > work.total * work.groups * work.key_bytes / gpu.bandwidth
        assert seconds <= cost.decode_seconds(gpu, plan, work, 1) * cost.TOLERANCE


def test_the_interpreter_has_one_split() -> None:
    work = cost.DecodeWork.of(np.array([4096], np.int32), launch.LONGEST, 32, 8, 512, 128)
    assert cost.splits(launch.INTERPRETER, plans.decode(launch.INTERPRETER, 128, 2), work) == 1
