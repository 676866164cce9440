"""Counting the tokens of each expert, in the checked interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.backend import choose
from trunkline.kernels.expert_counts import expert_counts_reference
from trunkline.kernels.triton import expert_counts
from trunkline.kernels.triton.expert_counts import BLOCK


@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (70, 3), (BLOCK, 2), (1025, 5)], ids=str)
@pytest.mark.parametrize("experts", [1, 8, 60, 257])
def test_equals_the_reference(shape: tuple[int, int], experts: int) -> None:
    """Ids outside of the range, too, and a strided view."""
    ids = torch.randint(-2, experts + 3, (shape[0], 2 * shape[1]), generator=torch.Generator().manual_seed(experts))
    ids = ids[:, ::2]
    counts = expert_counts.expert_counts(ids, experts)
    assert counts.dtype == torch.int32
    assert counts.tolist() == expert_counts_reference(ids, experts).tolist()


def test_ids_beyond_32_bits() -> None:
    ids = torch.tensor([[0, 2**32], [-(2**63), 2**63 - 1], [1, 2**32 + 1]])
    assert expert_counts.expert_counts(ids, 2).tolist() == [1, 1]


def test_the_backend_has_it() -> None:
    assert choose("triton", "cpu").expert_counts is expert_counts.expert_counts
