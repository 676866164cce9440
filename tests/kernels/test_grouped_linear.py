"""Products of groups of rows with their own matrices."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from trunkline.kernels import grouped_linear
from trunkline.kernels.deterministic.linear import OrderedLinear
from trunkline.kernels.grouped_linear import GroupedLinear, grouped_linear_cpu, grouped_linear_reference
from trunkline.kernels.linear import LinearLayer, PackedLinear, PlainLinear
from trunkline.kernels.quantized.linear import QuantizedLinear
from trunkline.kernels.quantized.weight import quantize_int4, quantize_int8


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


def layer_of(kind: str, weight: torch.Tensor) -> LinearLayer:
    if kind in ("int8", "int4"):
        quantized = (quantize_int8 if kind == "int8" else quantize_int4)(weight)
        assert quantized is not None
        return QuantizedLinear(quantized, weight.dtype)
    return {"packed": PackedLinear, "ordered": OrderedLinear, "plain": PlainLinear}[kind](weight)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[3, 0, 40, 1], [0, 0, 0, 1]])
@pytest.mark.parametrize(
    ("kinds", "inputs"),
    [
        ("packed", 96),
        ("packed", 2048),
        ("ordered", 96),
        ("int8", 96),
        ("int4", 2048),
        ("plain", 96),
        ("packed int8", 96),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_layers_of_groups_have_the_results_that_they_have_alone(
    kinds: str, inputs: int, dtype: torch.dtype, sizes: list[int], threads: int
) -> None:
    torch.manual_seed(inputs)
    known = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weights = [torch.randn(64, inputs).to(dtype) for _ in sizes]
        layers = [layer_of(kind, weight) for kind, weight in zip(cycle(kinds.split()), weights, strict=False)]
        x, ends = torch.randn(sum(sizes), inputs).to(dtype), torch.tensor(sizes).cumsum(0).to(torch.int32)
        found = GroupedLinear(layers)(x, ends)
        expected = torch.cat([layer(rows) for layer, rows in zip(layers, x.split(sizes), strict=True) if len(rows)])
    finally:
        torch.set_num_threads(known)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_results_depend_on_no_former_call() -> None:
    torch.manual_seed(1)
    layers = [layer_of("int8", torch.randn(64, 96)) for _ in range(3)]
    grouped = GroupedLinear(layers)
    for sizes in ([1, 0, 2], [400, 30, 0], [0, 1, 1], [0, 0, 0], [5, 300, 7]):
        x, ends = torch.randn(sum(sizes), 96), torch.tensor(sizes).cumsum(0).to(torch.int32)
        parts = [layer(rows) for layer, rows in zip(layers, x.split(sizes), strict=True) if len(rows)]
        assert torch.equal(grouped(x, ends), torch.cat(parts or [torch.empty(0, 64)]))
