"""Products of groups of rows with their own matrices."""

from __future__ import annotations

import pytest
import torch

from trunkline.kernels import grouped_linear
from trunkline.kernels.grouped_linear import grouped_linear_cpu, grouped_linear_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0, 0, 1], [0, 7, 0, 0], [0, 0, 0, 0]])
def test_like_a_product_for_each_group(sizes: list[int], dtype: torch.dtype, *, transposed: bool) -> None:
    torch.manual_seed(sum(sizes))
    x = torch.randn(sum(sizes), 16, dtype=dtype)
    weight = torch.randn(4, 16, 24, dtype=dtype).transpose(1, 2) if transposed else torch.randn(4, 24, 16, dtype=dtype)
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    expected = torch.cat(
        [rows.double() @ matrix.double().T for rows, matrix in zip(x.split(sizes), weight, strict=True)]
    )
    for product in (grouped_linear_cpu, grouped_linear_reference):
        found = product(x, weight, ends)
        assert (found.shape, found.dtype) == ((len(x), 24), dtype)
        assert torch.allclose(found.double(), expected, atol=1e-5 if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_odd_sizes_on_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(9, 7).to(dtype), torch.randn(3, 5, 7).to(dtype)
    expected = torch.cat([x[:2].double() @ weight[0].double().T, x[2:].double() @ weight[2].double().T])
    for product in (grouped_linear_cpu, grouped_linear_reference):
        found = product(x, weight, torch.tensor([2, 2, 9], dtype=torch.int32))
        assert torch.allclose(found.double(), expected, atol=1e-5 if dtype != torch.bfloat16 else 0.2)


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 24), (16, 5), (7, 8)])
def test_the_reference_loops_only_where_it_must(inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def loop(*_: torch.Tensor) -> None:
        raise NotImplementedError

    monkeypatch.setattr(grouped_linear, "grouped_linear_cpu", loop)
    given = torch.randn(9, inputs), torch.randn(3, outputs, inputs), torch.tensor([2, 2, 9], dtype=torch.int32)
    if (inputs, outputs) == (16, 24):
        assert grouped_linear_reference(*given).shape == (9, 24)
    else:
        with pytest.raises(NotImplementedError):
            grouped_linear_reference(*given)
