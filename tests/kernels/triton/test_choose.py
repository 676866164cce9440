"""The choice of the Triton backend, and attention through it, as models call it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from trunkline.kernels.backend import WIDEST_HEAD, choose
from trunkline.kernels.layout import KVSlots
from trunkline.kernels.triton import plans

from .attention_cases import SCALE, Case, assert_close


def test_default_on_a_gpu_and_in_the_interpreter() -> None:
    assert choose(None, "cuda").name == "triton"
    assert choose("triton", "cpu").name == "triton"
    assert choose(None, "cpu").name == "cpu"
    assert choose("triton", "cpu").captures


def test_triton_is_not_imported_before() -> None:
    """Nor for any other backend: it is optional, and takes a second."""
    code = (
        "import sys; from trunkline.kernels.backend import choose; choose(None, 'cpu'); choose('torch_native', 'cuda')"
    )
    subprocess.run([sys.executable, "-c", f"{code}; assert 'triton' not in sys.modules"], check=True)


@pytest.mark.parametrize("chunk", [0, 16])
def test_mixed_batch(chunk: int) -> None:
    """Decoding rows and prompts of one pass: keys and values are written first, then read through the table."""
    case = Case.build((6, 2, 40, 24), [5, 41, 9, 30, 12], [1, 1, 3, 11, 12])
    expected = case.extended(chunk=chunk)
    slots = case.layout.out_slots
    case.keys[slots], case.values[slots] = torch.nan, torch.nan
    case.layout.decodes = 2
    backend = choose("triton", "cpu")
    result = backend.attention(case.q, case.k, case.v, case.keys, case.values, case.layout, scale=SCALE, chunk=chunk)
    assert_close(result, expected)


def test_rotation_with_the_write_before_attention() -> None:
    """As in a fused layer: attention reads the rotated keys and the values from the pool, for they are nowhere else."""
    case = Case.build((6, 2, 40, 40), [5, 41, 9, 30, 12], [1, 1, 3, 11, 12])
    case.layout.decodes = 2
    tokens, pool = len(case.q), KVSlots(case.keys, case.values, case.layout.out_slots)
    qkv, cos, sin = torch.cat([case.q, case.k, case.v], 1), torch.randn(tokens, 24), torch.randn(tokens, 24)
    backend, plain, exact = choose("triton", "cpu"), choose("torch_native", "cpu"), qkv.double()
    plain.rope(exact, cos.double(), sin.double(), 6, 2)
    parts = torch.split(exact, [6, 2, 2], 1)
    wide = case.keys.double(), case.values.double()
    expected = plain.attention(*parts, *wide, case.layout, scale=SCALE)
    backend.rope(qkv, cos, sin, 6, 2, kv_slots=pool)
    parts = torch.split(qkv, [6, 2, 2], 1)
    result = backend.attention(*parts, case.keys, case.values, case.layout, scale=SCALE, written=True)
    assert_close(result, expected)


def test_heads_that_are_too_wide_for_triton(caplog: pytest.LogCaptureFixture) -> None:
    assert choose("triton", "cpu", WIDEST_HEAD).name == "triton"
    assert choose("triton", "cpu", WIDEST_HEAD + 1).name == "torch_native"
    assert "heads of 257 numbers are too wide for Triton kernels" in caplog.text
    assert plans.decode("sm_90", WIDEST_HEAD, 2)
    with pytest.raises(ValueError, match="only up to 256"):
        plans.decode("sm_90", WIDEST_HEAD + 1, 2)
