"""The references of a model's operations run on any device, and read no value on the host: the meta device has none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from trunkline.kernels.activation import ACTIVATIONS
from trunkline.kernels.backend import Backend, choose
from trunkline.kernels.layout import KVSlots
from trunkline.kernels.pool import MODES

Run = Callable[[Backend], torch.Tensor]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def rotated(backend: Backend) -> torch.Tensor:
    qkv, weights = meta(3, 8, 16), (meta(16, dtype=torch.float32), meta(16, dtype=torch.float32))
    kv_slots = KVSlots(meta(9, 2, 16), meta(9, 2, 16), meta(3, dtype=torch.int64))
    backend.rope(qkv, meta(3, 8), meta(3, 8), 4, 2, *weights, 1e-6, kv_slots)
    return qkv.flatten(1)


def vector() -> torch.Tensor:
    return meta(128, dtype=torch.float32)


# Each returns [3, 128].
OPERATIONS: dict[str, Run] = {
    "rms_norm": lambda one: one.rms_norm(meta(3, 128), vector(), 1e-6, meta(3, 128), meta(3, 128)),
    "layer_norm": lambda one: one.layer_norm(meta(3, 128), vector(), vector(), 1e-6, meta(3, 128), meta(3, 128)),
    "rope": rotated,
    "linear": lambda one: one.linear(meta(128, 64), meta(128)).forward(meta(3, 64), meta(3, 128)),
    "grouped_linear": lambda one: one.grouped_linear(meta(3, 64), meta(5, 128, 64), meta(5, dtype=torch.int32)),
    **{f"glu {name}": lambda one, name=name: one.glu(meta(3, 256), name) for name in ACTIVATIONS},
    **{f"activate {name}": lambda one, name=name: one.activate(meta(3, 128), name) for name in ACTIVATIONS},
    **{
        f"pool {mode}": lambda one, mode=mode: one.pool(meta(9, 128), meta(4, dtype=torch.int64), mode)
        for mode in MODES
    },
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_on_a_device_without_values(name: str) -> None:
    result = OPERATIONS[name](choose("torch_native", "cuda"))
    assert result.is_meta
    assert result.shape == (3, 128)


def test_reading_a_value_is_found() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        choose("cpu", "cpu").grouped_linear(meta(3, 64), meta(5, 128, 64), meta(5, dtype=torch.int32))
