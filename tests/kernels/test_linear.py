"""Packed linear layers against ``nn.Linear``'s formula, for every height of a tile and odd sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.kernels import linear
from trunkline.kernels.cpu import gemm
from trunkline.kernels.cpu.gemm_tiles import FLOAT_PANEL, PAIR_PANEL
from trunkline.kernels.cpu.processor import has_bfloat16, has_bfloat16_pairs
from trunkline.kernels.linear import LinearLayer, PackedLinear, PlainLinear, linear_reference, storage_dtype
from trunkline.kernels.quantized.linear import QuantizedLinear
from trunkline.kernels.quantized.weight import quantize_int8

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def weights(outputs: int, inputs: int, dtype: torch.dtype, *, exact: bool) -> torch.Tensor:
    """Random; ``exact`` ones fit in bfloat16."""
    weight = torch.randn(outputs, inputs) / inputs**0.5
    return (weight.bfloat16() if exact else weight).to(dtype)


@settings(max_examples=100)
@given(
    rows=st.integers(0, 40),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    exact=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_equals_the_formula(
    rows: int, inputs: int, outputs: int, exact: bool, bias: bool, residual: bool, dtype: torch.dtype
) -> None:
    weight = weights(outputs, inputs, dtype, exact=exact)
    shift = torch.randn(outputs).to(dtype) if bias else None
    x = torch.randn(rows, inputs).to(dtype)
    added = torch.randn(rows, outputs).to(dtype) if residual else None
    before = None if added is None else added.clone()
    result = PackedLinear(weight, shift)(x, added)
    float32_out = [None if part is None else part.double() for part in (x, weight, shift, added)]
    expected = linear_reference(*float32_out)  # type: ignore[arg-type]
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert added is None or torch.equal(added, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("outputs", [1, 32, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("pairs", [False, True])
def test_wide_results_are_the_sums(
    monkeypatch: pytest.MonkeyPatch, outputs: int, dtype: torch.dtype, pairs: bool
) -> None:
    """Of the size of logits, where neighbours in bfloat16 are an eighth apart."""
    monkeypatch.setattr(linear, "has_bfloat16", lambda: False)
    monkeypatch.setattr(linear, "has_bfloat16_pairs", lambda: pairs and has_bfloat16_pairs())
    weight, shift = weights(outputs, 64, dtype, exact=True), torch.full((outputs,), 24.0, dtype=dtype)
    for rows in (1, 2, 5, 13, 20):
        x = torch.randn(rows, 64).to(dtype)
        result = PackedLinear(weight, shift, float32_out=True)(x)
        assert result.dtype == torch.float32
        exact = linear_reference(x.double(), weight.double(), shift.double())
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than fit in a block, with a block that doesn't divide them."""
    monkeypatch.setattr(gemm, "BLOCK_BYTES", 12 * 4 * 40)
    weight, x = weights(48, 40, torch.float32, exact=True), torch.randn(101, 40)
    torch.testing.assert_close(PackedLinear(weight)(x), linear_reference(x, weight, None), rtol=1e-5, atol=1e-5)


def quantized(weight: torch.Tensor) -> LinearLayer:
    stored = quantize_int8(weight)
    assert stored is not None
    return QuantizedLinear(stored, weight.dtype)


def products(
    kind: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """x [90, 200], an addend [90, 160] and a function (some rows of both) -> the product with a weight [160, 200]."""
    torch.manual_seed(7)  # bfloat16 results that differ in the last bit may be further apart than the tolerance
    weight = torch.randn(160, 200)
    packed = gemm.pack_pairs(weight.bfloat16()) if kind == torch.bfloat16 else gemm.pack(weight, torch.float32)

    def product(x: torch.Tensor, addend: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(x), 160, dtype=kind)
        gemm.product(x.contiguous(), packed, addend.contiguous(), out)
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.2}[kind]
        torch.testing.assert_close(out, gemm.product_reference(x, packed, addend), rtol=0, atol=tolerance)
        return out

    return torch.randn(90, 200).to(kind), torch.randn(90, 160).to(kind), product


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("part", [8, 64, 104, 199])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_inputs_in_parts(kind: torch.dtype, part: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's results are the same bits, whatever the parts of K, the rows beside it and the threads."""
    if kind == torch.bfloat16 and not has_bfloat16_pairs():
        pytest.skip("this CPU doesn't multiply pairs of bfloat16")
    x, addend, product = products(kind)
    undivided = product(x, addend)
    monkeypatch.setattr(gemm, "_WHOLE", 0)
    monkeypatch.setattr(gemm, "PART", part * kind.itemsize)
    monkeypatch.setattr(gemm, "_GROUP", 3)
    monkeypatch.setattr(gemm, "_MIN_PARALLEL", 0)
    monkeypatch.setattr(gemm, "BLOCK_BYTES", 24 * part * kind.itemsize)
    monkeypatch.setattr(gemm, "team_size", lambda parallel=True: threads if parallel else 1)
    assert gemm.divide(200, kind.itemsize, 16).scratch_size > 0
    for rows in (1, 5, 12, 13, 24, 31, 90):
        first = int(torch.randint(0, 91 - rows, ()))
        some = slice(first, first + rows)
        assert torch.equal(product(x[some], addend[some]), undivided[some])


def test_large_products_are_divided() -> None:
    """With the sizes that serve: parts of K for many rows of many inputs only."""
    assert gemm.divide(576, 4, FLOAT_PANEL) == gemm.Parts(block=108, part=576, group=16, scratch_size=0)
    assert gemm.divide(8192, 4, FLOAT_PANEL)[:3] == (120, 512, 16)
    assert gemm.divide(8192, 2, PAIR_PANEL)[:3] == (120, 1024, 16)
    weight, x = weights(40, 2050, torch.float32, exact=True), torch.randn(150, 2050)
    torch.testing.assert_close(PackedLinear(weight)(x), linear_reference(x, weight, None), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("outputs", [16, 40, 320])
def test_panels_shared_by_threads(monkeypatch: pytest.MonkeyPatch, outputs: int) -> None:
    """More threads than panels, as many, and fewer."""
    monkeypatch.setattr(gemm, "_MIN_PARALLEL", 0)
    monkeypatch.setattr(gemm, "team_size", lambda parallel: 3 if parallel else 1)
    weight, x = weights(outputs, 40, torch.float32, exact=True), torch.randn(7, 40)
    torch.testing.assert_close(PackedLinear(weight)(x), linear_reference(x, weight, None), rtol=1e-5, atol=1e-5)


def test_product_is_its_reference() -> None:
    weight, x = torch.randn(32, 24), torch.randn(7, 24)
    for dtype in (torch.float32, torch.bfloat16):
        packed = gemm.pack(weight, dtype)
        assert packed.shape == (2, 24, FLOAT_PANEL)
        addend, out = torch.randn(7, 32), torch.empty(7, 32)
        gemm.product(x, packed, addend, out)
        torch.testing.assert_close(out, gemm.product_reference(x, packed, addend), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not has_bfloat16_pairs(), reason="this CPU doesn't multiply pairs of bfloat16")
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 12, 19, 31])
def test_product_of_pairs_is_its_reference(rows: int) -> None:
    weight, x = torch.randn(80, 24).bfloat16(), torch.randn(rows, 24).bfloat16()
    packed = gemm.pack_pairs(weight)
    assert packed.shape == (3, 12, PAIR_PANEL, 2)
    for addend in (torch.randn(96).bfloat16(), torch.randn(rows, 96).bfloat16()):
        out = torch.empty(rows, 96, dtype=torch.bfloat16)
        gemm.product(x, packed, addend, out)
        expected = gemm.product_reference(x, packed, addend)
        torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
        exact = x.double() @ weight.double().t() + addend.double()[..., :80]
        torch.testing.assert_close(out[:, :80].double(), exact, rtol=1e-2, atol=1e-2)


def test_float32_rows_when_the_cpu_has_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_bfloat16_pairs", lambda: False)
    monkeypatch.setattr(linear, "has_bfloat16", lambda: False)
    weight, x = torch.randn(32, 24).bfloat16(), torch.randn(5, 24).bfloat16()
    layer = PackedLinear(weight)
    assert not layer.recordable
    torch.testing.assert_close(layer(x), linear_reference(x, weight, None), rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU doesn't multiply bfloat16")
def test_onednn_in_earnest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "has_bfloat16_pairs", lambda: False)
    weight, bias, x = torch.randn(40, 24).bfloat16(), torch.randn(40).bfloat16(), torch.randn(5, 24).bfloat16()
    residual = torch.randn(5, 40).bfloat16()
    layer = PackedLinear(weight, bias)
    assert layer.onednn
    assert not layer.recordable
    torch.testing.assert_close(layer(x, residual), linear_reference(x, weight, bias, residual), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("kind", [PackedLinear, PlainLinear])
def test_any_leading_shape(kind: Callable[..., LinearLayer]) -> None:
    weight, bias, x = torch.randn(20, 12), torch.randn(20), torch.randn(2, 3, 12)
    layer = kind(weight, bias)
    torch.testing.assert_close(layer(x), linear_reference(x, weight, bias), rtol=1e-5, atol=1e-5)
    assert layer(x[0, 0]).shape == (20,)
    assert "in_features=12, out_features=20" in repr(layer)


def test_stored_in_half_only_if_nothing_is_lost() -> None:
    exact = weights(64, 32, torch.float32, exact=True)
    assert storage_dtype(exact) == storage_dtype(exact.bfloat16()) == torch.bfloat16
    exact[63, 31] += 1e-3
    assert storage_dtype(exact) == torch.float32
    x = torch.randn(3, 32)
    torch.testing.assert_close(PackedLinear(exact)(x), linear_reference(x, exact, None), rtol=1e-5, atol=1e-5)


def test_not_a_number_stays_in_its_row() -> None:
    x = torch.randn(9, 30)
    x[4, 2] = torch.inf
    result = PackedLinear(torch.rand(40, 30) + 0.1)(x)
    assert result[4].isinf().all()
    assert result[torch.arange(9) != 4].isfinite().all()


def test_refuses_what_does_not_fit() -> None:
    packed, out = gemm.pack(torch.randn(16, 8), torch.float32), torch.empty(3, 16)
    with pytest.raises(ValueError, match="don't fit"):
        gemm.product(torch.randn(3, 9), packed, torch.zeros(16), out)
    with pytest.raises(ValueError, match="addend has 2 rows, x has 3"):
        gemm.product(torch.randn(3, 8), packed, torch.zeros(2, 16), out)
    with pytest.raises(ValueError, match=r"x must be a contiguous CPU tensor of torch\.float32"):
        gemm.product(torch.randn(3, 8).double(), packed, torch.zeros(16), out)


def test_onednn_where_it_multiplies_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which way a bfloat16 model takes depends on the CPU; its arguments to oneDNN don't."""
    calls: list[tuple[object, ...]] = []

    def pointwise(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        return linear_reference(*arguments[:3])  # type: ignore[arg-type]

    monkeypatch.setattr(linear, "has_bfloat16", lambda: True)
    monkeypatch.setattr(linear, "has_bfloat16_pairs", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, rows: weight)
    monkeypatch.setattr(torch.ops.mkldnn._linear_pointwise, "default", pointwise)
    weight, bias = torch.randn(16, 8).bfloat16(), torch.randn(16).bfloat16()
    x, residual = torch.randn(3, 8).bfloat16(), torch.randn(3, 16).bfloat16()
    result = PackedLinear(weight, bias)(x, residual)
    torch.testing.assert_close(result, linear_reference(x, weight, bias, residual))
    assert len(calls) == 1
    assert PackedLinear(weight.float(), None)(x.float()).dtype == torch.float32
    assert len(calls) == 1  # float32 goes another way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_plain_linear(dtype: torch.dtype) -> None:
    weight, bias, x = torch.randn(20, 12).to(dtype), torch.randn(20).to(dtype), torch.randn(3, 12).to(dtype)
    residual = torch.randn(3, 20).to(dtype)
    before = residual.clone()
    layer = PlainLinear(weight, bias)
    assert layer.weight(slice(0, 20)).data_ptr() == weight.data_ptr()  # not copied
    assert torch.equal(layer.weight(slice(3, 7)), weight[3:7])
    torch.testing.assert_close(layer(x, residual), x @ weight.T + bias + residual, rtol=3e-2, atol=6e-2)
    assert torch.equal(residual, before)
    layer.set_bias(None)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=3e-2, atol=6e-2)
    assert not layer.recordable
    assert PlainLinear(weight, bias, float32_out=True)(x).dtype == torch.float32


@pytest.mark.parametrize("made", [PackedLinear, quantized])
def test_refuses_rows_of_another_width(made: Callable[[torch.Tensor], LinearLayer]) -> None:
    """Twice as many rows of half the width would have as many numbers."""
    with pytest.raises(ValueError, match="rows must have 64 numbers, not 32"):
        made(torch.randn(32, 64))(torch.randn(6, 32))
