"""Launches that run block by block against the same launches over all rows at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trunkline.kernels.activation import activate_cpu
from trunkline.kernels.cpu import gemm
from trunkline.kernels.cpu.launches.memory import keep_alive
from trunkline.kernels.cpu.launches.row_blocks import CAPACITY, MIN_BLOCK, RowBlocks, block_bounds
from trunkline.kernels.layer_norm import layer_norm_cpu
from trunkline.kernels.linear import LinearLayer, PackedLinear
from trunkline.kernels.norm import rms_norm_cpu
from trunkline.kernels.quantized.linear import QuantizedLinear
from trunkline.kernels.quantized.weight import quantize_int4, quantize_int8


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def plain(weight: torch.Tensor) -> LinearLayer:
    return PackedLinear(weight, torch.randn(len(weight)).to(weight))


LINEARS = {
    "plain": plain,
    "int8": lambda weight: QuantizedLinear(quantize_int8(weight), weight.dtype),
    "int4": lambda weight: QuantizedLinear(quantize_int4(weight), weight.dtype),
}


class Mlp:
    """A post-norm MLP, over all rows at once or in blocks."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        torch.manual_seed(3)
        self.dtype = dtype
        self.up, self.down = (LINEARS[kind](torch.randn(n, k).to(dtype) / 8) for n, k in ((128, 64), (64, 128)))
        self.norm = torch.rand(64), torch.randn(64), 1e-6

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        hidden = activate_cpu(self.up.forward(x), "gelu")
        return layer_norm_cpu(self.down.forward(hidden), *self.norm, x)

    def blocks(self, former: RowBlocks | None = None) -> RowBlocks:
        x, out = (torch.full((CAPACITY, 64), torch.nan, dtype=self.dtype) for _ in range(2))
        with RowBlocks([x, out], former) as blocks:
            hidden = self.up.forward_into(x, keep_alive(torch.zeros(CAPACITY, 128, dtype=self.dtype)))
            self.down.forward_into(activate_cpu(hidden, "gelu", hidden), out)
            layer_norm_cpu(out, *self.norm, x, out)
        assert x.isnan().all()  # recorded, not run
        return blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LINEARS)
def test_same_bits_for_any_number_of_rows(kind: str, dtype: torch.dtype, threads: int) -> None:
    mlp = Mlp(kind, dtype)
    if not (mlp.up.recordable and mlp.down.recordable):
        pytest.skip("this CPU multiplies bfloat16 by oneDNN, whose products aren't recorded")
    blocks = mlp.blocks()
    for rows in (1, 3, MIN_BLOCK, 100, 2 * threads * MIN_BLOCK + 1, 700, 5):
        given = torch.randn(rows, 64).to(dtype)
        kept, out = given.clone(), torch.full((rows + 1, 64), torch.nan, dtype=dtype)
        blocks.run(given, out[:rows])
        assert torch.equal(out[:rows], mlp(given))
        assert torch.equal(given, kept)
        assert out[rows].isnan().all()


def test_blocks_that_share_scratch_memory(threads: int) -> None:
    first, second = Mlp("plain", torch.float32), Mlp("int8", torch.float32)
    former = first.blocks()
    blocks, x, out = second.blocks(former), torch.randn(300, 64), torch.empty(300, 64)
    for _ in range(2):
        former.run(x, out)
        assert torch.equal(out, first(x))
        blocks.run(x, out)
        assert torch.equal(out, second(x))


def test_products_whose_inputs_are_in_parts(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have scratch memory of their own for each thread."""
    monkeypatch.setattr(gemm, "_WHOLE", 0)
    monkeypatch.setattr(gemm, "PART", 64)
    layer, x = PackedLinear(torch.randn(64, 96)), torch.randn(500, 96)
    given, result, out = torch.empty(CAPACITY, 96), torch.empty(CAPACITY, 64), torch.empty(500, 64)
    with RowBlocks([given, result]) as blocks:
        layer.forward_into(given, result)
    blocks.run(x, out)
    assert torch.equal(out, layer.forward(x))


def test_in_place(threads: int) -> None:
    weight, x, given = torch.rand(48), torch.randn(400, 48), torch.empty(CAPACITY, 48)
    expected = rms_norm_cpu(rms_norm_cpu(x, weight, 1e-6), weight, 1e-6)
    with RowBlocks([given]) as blocks:
        rms_norm_cpu(rms_norm_cpu(given, weight, 1e-6, out=given), weight, 1e-6, out=given)
    blocks.run(x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    "wrong",
    [torch.empty(8, 9), torch.empty(9, 8), torch.empty(9, 9, dtype=torch.bfloat16), torch.empty(9, 18)[:, ::2]],
    ids=["rows", "width", "dtype", "strides"],
)
def test_refuses_inputs_of_another_kind(wrong: torch.Tensor) -> None:
    x, out = torch.empty(CAPACITY, 9), torch.empty(CAPACITY, 9)
    with RowBlocks([x, out]) as blocks:
        rms_norm_cpu(x, torch.ones(9), 1e-6, out=out)
    with pytest.raises(ValueError, match="input 1 must be a contiguous"):
        blocks.run(torch.empty(9, 9), wrong)
    with pytest.raises(ValueError, match="argument"):
        blocks.run(torch.empty(9, 9))


def test_launches_run_again_once_the_recording_ends() -> None:
    with pytest.raises(ZeroDivisionError), RowBlocks([]):
        raise ZeroDivisionError
    assert rms_norm_cpu(torch.randn(2, 8), torch.ones(8), 1e-6).abs().max() > 0


@given(rows=st.integers(1, 10_000), team=st.integers(1, 130))
def test_blocks_are_all_rows_once(rows: int, team: int) -> None:
    bounds = block_bounds(rows, team)
    sizes = np.diff(bounds)
    assert (bounds[0], bounds[-1]) == (0, rows)
    assert (sizes > 0).all()
    assert (sizes <= CAPACITY).all()
    earlier, last = sizes[:-team], sizes[-team:]
    assert (earlier[:-1] >= earlier[1:]).all()
    assert (last <= 2 * MIN_BLOCK).all()
    assert last.max() - last.min() < 4 * team
