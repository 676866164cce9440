"""Counting the tokens of each expert."""

from __future__ import annotations

import pytest
import torch

from trunkline.kernels.backend import choose


@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (50, 3)], ids=str)
@pytest.mark.parametrize("experts", [1, 8, 60])
@pytest.mark.parametrize("backend", ["cpu", "torch_native"])
def test_like_bincount(shape: tuple[int, int], experts: int, backend: str) -> None:
    ids = torch.randint(experts, shape, generator=torch.Generator().manual_seed(experts))
    counts = choose(backend, "cpu").expert_counts(ids, experts)
    assert counts.dtype == torch.int32
    assert counts.tolist() == torch.bincount(ids.flatten(), minlength=experts).tolist()


def test_other_ids_are_not_counted() -> None:
    ids = torch.tensor([[0, -1], [3, 2], [2**63 - 1, -(2**63)], [4, 2]])
    for backend in ("cpu", "torch_native"):
        assert choose(backend, "cpu").expert_counts(ids, 3).tolist() == [1, 0, 2]


def test_on_a_device_without_values() -> None:
    counts = choose("torch_native", "cuda").expert_counts(torch.empty(7, 2, dtype=torch.int64, device="meta"), 5)
    assert (counts.is_meta, counts.shape, counts.dtype) == (True, (5,), torch.int32)
