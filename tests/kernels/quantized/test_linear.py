"""Quantised linear layers against their formula, for every form of codes that this CPU can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import llvmlite.binding as llvm
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.kernels.cpu.launches.recording import Recording
from trunkline.kernels.cpu.quantized import gemm, panels
from trunkline.kernels.cpu.quantized.codes import Form, best_form
from trunkline.kernels.quantized.linear import QuantizedLinear, quantized_linear_reference
from trunkline.kernels.quantized.subgroups import Subgroups
from trunkline.kernels.quantized.weight import QuantizedWeight, quantize_int4, quantize_int8

# Plain LLVM IR runs everywhere, and has the layouts of the instructions that this CPU may lack.
CASES = [(bits, form) for bits in (4, 8) for form in (best_form(bits), Form(8, 2), Form(8, 4), Form(16, 4))]
if llvm.get_host_cpu_features().get("avx2"):
    CASES += [(4, Form(8, 4, "short")), (4, Form(8, 2, "madd")), (8, Form(8, 2, "madd"))]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
QUANTIZE: dict[int, Callable[[torch.Tensor], QuantizedWeight | None]] = {4: quantize_int4, 8: quantize_int8}


def quantized(outputs: int, inputs: int, bits: int) -> QuantizedWeight:
    made = QUANTIZE[bits](torch.randn(outputs, inputs) / inputs**0.5)
    assert made is not None
    return made


@settings(max_examples=60)
@given(
    rows=st.integers(0, 30),
    groups=st.integers(1, 12),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    residual=st.booleans(),
    ordered=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    case=st.sampled_from(CASES),
)
def test_equals_the_formula(
    rows: int,
    groups: int,
    outputs: int,
    bias: bool,
    residual: bool,
    ordered: bool,
    dtype: torch.dtype,
    case: tuple[int, Form],
) -> None:
    bits, form = case
    weight = quantized(outputs, 32 * groups, bits)
    if ordered:
        weight = replace(weight, order=torch.randperm(32 * groups))
    shift = torch.randn(outputs).to(dtype) if bias else None
    x = torch.randn(rows, 32 * groups).to(dtype)
    added = torch.randn(rows, outputs).to(dtype) if residual else None
    before = None if added is None else added.clone()
    result = QuantizedLinear(weight, dtype, shift, form)(x, added)
    expected = quantized_linear_reference(x, weight, shift, added)
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert added is None or torch.equal(added, before)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "form"), CASES)
def test_integer_sums_dont_overflow(bits: int, form: Form) -> None:
    """All numbers and codes the largest, in the largest groups."""
    inputs = 1024
    for sign in (-1.0, 1.0):
        rows, weight = torch.full((3, inputs), sign), torch.ones(16, inputs)
        made = QUANTIZE[bits](weight)
        assert made is not None
        assert made.group == (256 if bits == 4 else 64)
        assert int(made.codes.min()) == 2**bits - 1
        result = QuantizedLinear(made, torch.float32, form=form)(rows)
        torch.testing.assert_close(result, torch.full((3, 16), sign * inputs), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("bits", "form"), CASES)
def test_a_rows_result_has_the_same_bits_in_any_batch(bits: int, form: Form) -> None:
    layer, x = QuantizedLinear(quantized(48, 96, bits), torch.float32, form=form), torch.randn(37, 96)
    whole = layer(x)
    for first, last in ((0, 1), (3, 5), (1, 9), (20, 37)):
        assert torch.equal(layer(x[first:last]), whole[first:last])


def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "BLOCK_BYTES", 12 * 256)
    layer, x = QuantizedLinear(quantized(48, 96, 8), torch.float32), torch.randn(101, 96)
    assert torch.equal(layer(x), torch.cat([layer(one) for one in x.split(5)]))


@pytest.mark.parametrize("form", [form for bits, form in CASES if bits == 4])
def test_many_rows_have_the_bits_of_few(form: Form) -> None:
    """Codes are expanded once for all of their tiles, if they are expanded."""
    layer, x = QuantizedLinear(quantized(80, 320, 4), torch.bfloat16, form=form), torch.randn(101, 320).bfloat16()
    assert len(x) > panels.MANY_ROWS
    assert torch.equal(layer(x), torch.cat([layer(one) for one in x.split(5)]))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_isnt_finite_has_no_finite_result_and_leaves_others_alone(number: float) -> None:
    for bits in (4, 8):
        layer, x = QuantizedLinear(quantized(32, 64, bits), torch.float32), torch.randn(4, 64)
        expected = layer(x)
        x[2, 40] = number
        result = layer(x)
        assert not result[2].isfinite().any()
        assert torch.equal(result[[0, 1, 3]], expected[[0, 1, 3]])


def test_rows_of_zeros_and_of_very_small_numbers() -> None:
    layer = QuantizedLinear(quantized(32, 64, 8), torch.float32)
    for rows in (torch.zeros(2, 64), torch.full((2, 64), 1e-38)):
        assert torch.equal(layer(rows), torch.zeros(2, 32))


@pytest.mark.parametrize(("bits", "form"), CASES)
def test_the_weight_can_be_read(bits: int, form: Form) -> None:
    weight = quantized(160, 192, bits)
    layer, numbers = QuantizedLinear(weight, torch.float32, form=form), weight.numbers()
    order = torch.randperm(192)
    sorted_inputs = QuantizedLinear(replace(weight, order=order), torch.float32, form=form)
    for rows in (slice(0, 160), slice(3, 20), slice(33, 34)):
        assert torch.equal(layer.weight(rows), numbers[rows])
        assert torch.equal(sorted_inputs.weight(rows)[:, order], numbers[rows])
    packed = layer.packed
    stored = sum(one.nbytes for one in (packed.codes, packed.factors, packed.scales, packed.minima, packed.subgroups))
    assert stored <= numbers.nbytes * (bits + 1.4) / 32


def test_all_forms_give_the_same_bits() -> None:
    """Integers are exact, and floats are added in the same order."""
    for bits in (4, 8):
        weight, x = quantized(80, 320, bits), torch.randn(70, 320)
        results = [QuantizedLinear(weight, torch.float32, form=form)(x) for kind, form in CASES if kind == bits]
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("bits", [4, 8])
def test_launches_are_recorded(bits: int) -> None:
    layer, x, out = QuantizedLinear(quantized(64, 96, bits), torch.float32), torch.randn(90, 96), torch.zeros(90, 64)
    assert layer.recordable
    with (recording := Recording()):
        layer.forward_into(x, out, out)
    x.normal_()
    for rows in (5, 90):
        residual = out.normal_().clone()
        recording.run(rows)
        torch.testing.assert_close(out[:rows], layer(x[:rows], residual[:rows]))
        assert torch.equal(out[rows:], residual[rows:])


def test_a_recording_has_scratch_memory_for_the_whole_team() -> None:
    """Also if the product is too small for more than one thread: the team replays it."""
    layer, x, sizes = QuantizedLinear(quantized(64, 96, 4), torch.float32), torch.randn(90, 96), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with (recording := Recording()):
                layer.forward_into(x, torch.zeros(90, 64))
            sizes.append(len(recording.memory.scratch(1, of_threads=True)))
    finally:
        torch.set_num_threads(before)
    panel = 96 * layer.packed.form.columns
    assert sizes[1] - sizes[0] == (0 if layer.packed.form.instruction == "short" else 2 * panel)


def test_weights_that_dont_fit_are_refused() -> None:
    codes, factors = torch.full((4, 48), 15, dtype=torch.uint8), torch.ones(4)
    for bits, group, message in ((4, 16, "groups of 16"), (8, 6, "groups of 6"), (8, 32, "groups of 32")):
        weight = QuantizedWeight(bits, group, codes, factors, torch.ones(4, 3).half(), zero=8)
        with pytest.raises(ValueError, match=message):
            QuantizedLinear(weight, torch.float32, form=Form(8, 4, "short") if bits == 4 else Form(8, 4))
    weight = QuantizedWeight(4, 48, codes + 1, factors, torch.ones(4, 1).half(), zero=8)
    with pytest.raises(ValueError, match="codes have up to 4 bits, not 16"):
        QuantizedLinear(weight, torch.float32, form=Form(8, 4))
    weight = quantized(8, 96, 4)
    assert weight.subgroups is not None
    multipliers, offsets = weight.subgroups
    for changes in (
        {"group": 48, "scales": torch.ones(8, 2).half()},
        {"bits": 8},
        {"minima": torch.ones(8, 1).half()},
        {"subgroups": Subgroups(multipliers, offsets[:, :2])},
        {"subgroups": Subgroups(multipliers.int(), offsets)},
        {"subgroups": Subgroups(multipliers + 200, offsets)},
    ):
        with pytest.raises(ValueError, match=r"subgroups have codes of 4 bits|multipliers and offsets"):
            QuantizedLinear(replace(weight, **changes), torch.float32, form=Form(8, 4))
    for order in (torch.zeros(64).int(), torch.arange(63), torch.arange(64) + 1):
        with pytest.raises(ValueError, match="each of the 64 inputs once"):
            QuantizedLinear(replace(quantized(32, 64, 8), order=order), torch.float32)
    with pytest.raises(ValueError, match="int16 sums hold codes of 4 bits only"):
        QuantizedLinear(quantized(32, 64, 8), torch.float32, form=Form(8, 4, "short"))


def test_tensors_that_dont_fit_are_refused() -> None:
    layer = QuantizedLinear(quantized(32, 64, 8), torch.float32)
    with pytest.raises(ValueError, match="don't fit"):
        layer.forward_into(torch.randn(2, 32), torch.empty(2, 32))
    with pytest.raises(ValueError, match="addend has 3 rows"):
        layer.forward_into(torch.randn(2, 64), torch.empty(2, 32), torch.empty(3, 32))
    with pytest.raises(ValueError, match="contiguous CPU tensor"):
        layer.forward_into(torch.randn(2, 64).double(), torch.empty(2, 32))
