"""Writing keys and values into the pool, in the checked interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.kv_write import write_reference
from trunkline.kernels.triton.kv_write import write

from .tolerances import DTYPES


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize(("own", "dtype"), [*((one, one) for one in DTYPES), (DTYPES[0], DTYPES[1])], ids=str)
def test_equals_the_reference(tokens: int, own: torch.dtype, dtype: torch.dtype) -> None:
    """Keys and values of different widths, one of them a strided view; the pool may have another dtype."""
    k, v = torch.randn(tokens, 5, 20).to(own)[:, 1:4], torch.randn(3, tokens, 24).to(own).transpose(0, 1)
    keys, values = torch.randn(100, 3, 20).to(dtype), torch.randn(100, 3, 24).to(dtype)
    slots = torch.randperm(100)[:tokens]
    expected = keys.clone(), values.clone()
    write_reference(k, v, *expected, slots)
    write(k, v, keys, values, slots)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])
