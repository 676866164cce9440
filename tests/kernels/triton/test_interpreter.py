"""Launches under the checked interpreter: program order, messages, kinds of arguments, and what it leaves behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as upstream
from triton.tools.tensor_descriptor import TensorDescriptor

from . import seeded_access, seeded_values
from .checked import Checks, KernelBug, checked


@triton.jit
def ticket(counter, order):
    """Each program notes its turn."""
    turn = tl.atomic_add(counter, 1)
    tl.store(order + tl.program_id(0) * 2 + tl.program_id(1), turn)


def turns(**options: object) -> list[int]:
    counter, order = torch.zeros(1, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    with checked(**options):  # type: ignore[arg-type]
        ticket[(4, 2)](counter, order)
    return order.tolist()


def test_programs_run_in_a_random_order_that_its_seed_repeats() -> None:
    assert turns(seed=3) == turns(seed=3)
    assert len({tuple(turns(seed=seed)) for seed in range(5)}) > 1
    assert sorted(turns(seed=3)) == list(range(8))
    assert turns(order="forward") == list(range(8))
    assert turns(order="backward") == list(range(8))[::-1]


def test_only_the_last_programs_run() -> None:
    counter, order = torch.zeros(1, dtype=torch.int32), torch.full((8,), -1, dtype=torch.int32)
    with checked() as session:
        session.last = 3
        ticket[(4, 2)](counter, order)
        assert order[:5].tolist() == [-1] * 5
        assert sorted(order[5:].tolist()) == [0, 1, 2]
        session.last = 9
        ticket[(4, 2)](counter, order)
    assert sorted(order.tolist()) == list(range(3, 11))


def test_the_seed_is_printed_and_taken_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRUNKLINE_PROGRAM_ORDER_SEED", "17")
    assert turns() == turns(seed=17)
    assert capsys.readouterr().out.splitlines()[0] == "checked interpreter: TRUNKLINE_PROGRAM_ORDER_SEED=17"


def test_a_bug_names_the_tensor_the_kernel_and_the_program() -> None:
    with checked(seed=5), pytest.raises(KernelBug, match=r"store of 4 bytes at byte 508 of 'out'.* \(100 el") as caught:
        seeded_access.store_without_mask(True)
    assert caught.value.__notes__ == [
        "in double, grid (2, 1, 1), last program 1 (1, 0, 0); TRUNKLINE_PROGRAM_ORDER_SEED=5"
    ]
    with checked(), pytest.raises(KernelBug, match=r"program 2 stores and program 3 stores element 0 of 'out'"):
        seeded_values.two_programs_store_one_element(True)


@triton.jit
def inner(x, i):
    return tl.load(x + i)


@triton.jit
def outer(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, inner(x, i + 1))


def test_a_bug_in_a_device_function_is_still_a_kernel_bug() -> None:
    memory = torch.zeros(32)
    with checked(), pytest.raises(KernelBug, match="bounds"):
        outer[(1,)](memory[:16], memory[16:], BLOCK=16)


@triton.jit
def through_a_table(addresses, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.load(addresses + tl.program_id(0)).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(out + tl.program_id(0) * BLOCK + i, tl.load(row + i))


def test_a_table_of_addresses_reaches_allowed_tensors_only() -> None:
    rows = torch.randn(8), torch.randn(8)
    addresses, out = torch.tensor([row.data_ptr() for row in rows]), torch.zeros(16)
    with checked(allowed=rows):
        through_a_table[(2,)](addresses, out, BLOCK=8)
    assert torch.equal(out, torch.cat(rows))
    with checked(allowed=rows[:1]), pytest.raises(KernelBug, match="in no tensor that the launch knows"):
        through_a_table[(2,)](addresses, out, BLOCK=8)


@triton.jit
def described(source, out, BLOCK: tl.constexpr):
    target = tl.make_tensor_descriptor(out, (8, BLOCK), (BLOCK, 1), (8, BLOCK))
    target.store([0, 0], source.load([0, 0]))


def test_descriptors_and_missing_arguments() -> None:
    x, out = torch.randn(8, 16), torch.zeros(8, 16)
    with checked():
        described[(1,)](TensorDescriptor.from_tensor(x, [8, 16]), out, BLOCK=16)
        assert torch.equal(out, x)
        optional[(1,)](x, None, out)
    assert out[0, 0] == x[0, 0]


@triton.jit
def optional(x, y, out):
    value = tl.load(x)
    if y is not None:
        value += tl.load(y)
    tl.store(out, value)


@triton.jit
def noise(seed, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.rand(seed, i))


def test_hash_functions_may_wrap_unsigned_integers() -> None:
    out, plain = torch.zeros(64), torch.zeros(64)
    noise[(1,)](77, plain, BLOCK=64)
    with checked():
        noise[(1,)](77, out, BLOCK=64)
    assert torch.equal(out, plain)
    assert out.unique().numel() > 60


@triton.jit
def known_bits(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    flag = (i < n) & (tl.load(x + i, i < n) > 0)  # False & undefined is False
    tl.store(out + i, tl.where(flag, 1.0, 0.0))


def test_a_mask_that_decides_an_undefined_value_defines_it() -> None:
    x, out = torch.ones(5), torch.full((8,), 2.0)
    with checked():
        known_bits[(1,)](x, out, 5, BLOCK=8)
    assert out.tolist() == [1.0] * 5 + [0.0] * 3


def test_the_plain_interpreter_is_left_as_it_was() -> None:
    before = {name: getattr(upstream, name) for name in ("GridExecutor", "ReduceOps", "_patch_lang", "_implicit_cvt")}
    builder, options = type(upstream.interpreter_builder), upstream.interpreter_builder.options
    language = tl.range, tl.multiple_of, vars(tl.tensor).copy()
    with checked(), pytest.raises(KernelBug):
        seeded_access.load_one_after_the_end(True)
    with checked(), pytest.raises(RuntimeError, match="installed already"), checked():
        pass
    assert before == {name: getattr(upstream, name) for name in before}
    assert type(upstream.interpreter_builder) is builder
    assert upstream.interpreter_builder.options == options
    assert language == (tl.range, tl.multiple_of, vars(tl.tensor).copy())
    assert seeded_access.load_one_after_the_end(True)


def test_numpy_warns_of_nothing() -> None:
    """0 / 0 in a row that is thrown away is no error on a GPU, and pytest makes errors of warnings."""
    x, out = torch.zeros(4), torch.zeros(4)
    with checked(Checks(races=False)):
        divide[(1,)](x, out, BLOCK=4)
    assert np.isnan(out.numpy()).all()


@triton.jit
def divide(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(out + i, value / value)


@triton.jit
def mixed_sizes(x, out, BUG: tl.constexpr):
    """Program 0 stores four bytes; program 1 reads one of them, or the one after them."""
    if tl.program_id(0) == 0:
        tl.store(x, 1.0)
    else:
        narrow = x.to(tl.pointer_type(tl.int8), bitcast=True)
        tl.store(out, tl.load(narrow + (3 if BUG else 4)))


def test_accesses_of_different_sizes_race_when_they_overlap() -> None:
    x, out = torch.zeros(2), torch.zeros(1, dtype=torch.int8)
    with checked():
        mixed_sizes[(2,)](x, out, BUG=False)
        with pytest.raises(KernelBug, match="race: program 0 stores and program 1 loads element 0 of 'x'"):
            mixed_sizes[(2,)](x, out, BUG=True)


@triton.jit
def counted(counter, out, READER: tl.constexpr):
    """Programs 0 to 2 count; ``READER`` also reads the count without an atomic operation."""
    if tl.program_id(0) < 3:
        tl.atomic_add(counter, 1)
    if tl.program_id(0) == READER:
        tl.store(out + READER, tl.load(counter))
    else:
        tl.store(out + tl.program_id(0), tl.atomic_add(counter, 0))


@pytest.mark.parametrize("reader", [0, 1, 2, 3])
def test_atomic_operations_race_with_plain_ones_only(reader: int) -> None:
    counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with checked():
        counted[(4,)](counter, out, READER=-1)
        with pytest.raises(KernelBug, match=rf"race: program \d updates and program {reader} loads element 0 of 'c"):
            counted[(4,)](counter, out, READER=reader)


@pytest.mark.parametrize(
    ("tensor", "inside", "outside"),
    [
        (torch.zeros(4, 8)[:, 2:6], [0, 3, 8, 27], [4, 7, 28, -1]),
        (torch.zeros(4, 8).T, [0, 31], [32, -1]),
        (torch.zeros(4, 8)[::2, ::2], [0, 2, 6, 16, 22], [1, 8, 23]),
        (torch.zeros(8).expand(3, 8), [0, 7], [8]),
        (torch.zeros(3, 1, 5)[1:2], [0, 4], [5, -1]),
        (torch.zeros(8).as_strided((3, 4), (2, 1)), [0, 7], [8]),
        (torch.tensor(1.0), [0], [1]),
        (torch.zeros(0), [], [0]),
    ],
)
def test_the_elements_of_a_view(tensor: torch.Tensor, inside: list[int], outside: list[int]) -> None:
    with checked():
        for at in inside:
            touch[(1,)](tensor, torch.tensor([at]))
        for at in outside:
            with pytest.raises(KernelBug, match="bounds"):
                touch[(1,)](tensor, torch.tensor([at]))


@triton.jit
def touch(x, at):
    tl.store(x + tl.load(at), 0.0)
