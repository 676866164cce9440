"""Sampling in the checked interpreter: the tokens of the reference and of the CPU, and their noise bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

pytest.importorskip("triton")

import triton
import triton.language as tl

from trunkline.kernels.cpu.sampling.sample import noise as inner_cpu_noise
from trunkline.kernels.cpu.sampling.sample import splitmix
from trunkline.kernels.sample import noise as expected_noise
from trunkline.kernels.sample import sample_cpu, sample_reference
from trunkline.kernels.triton import plans, sample

from .tolerances import DTYPES

ROWS = 8
cpu_noise = njit(inner_cpu_noise.py_func)  # the kernel's own can't be called from Python
OPTIONS = (
    torch.tensor([0.0, 0.1, 0.7, 1.0, 1.0, 1.0, 2.0, 1.0]),
    torch.tensor([-1, 5, 50, 1, -1, -1, 3, 2**40]),
    torch.tensor([1.0, 0.9, 0.5, 1.0, 1.0, 0.3, 0.99, 0.95]),
    torch.tensor([0.0, 0.0, 0.1, 0.0, 0.05, 0.0, 0.0, 0.0]),
)


@triton.jit
def noise_kernel(seed, position, out, N: tl.constexpr):  # type: ignore[no-untyped-def]
    ids = tl.arange(0, N)
    tl.store(out + ids, sample.noise(tl.load(seed), tl.load(position), ids))


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345])
@pytest.mark.parametrize("position", [0, 77, 2**40])
def test_noise_is_the_same_on_the_cpu_bit_by_bit(seed: int, position: int) -> None:
    out, compiled = torch.empty(4096), np.empty(4096, np.float32)
    seeds, positions = torch.tensor([seed]), torch.tensor([position])
    noise_kernel[(1,)](seeds, positions, out, N=4096)
    assert torch.equal(out, expected_noise(seeds, positions, torch.arange(4096)[None])[0])
    cpu_noise(int(splitmix(splitmix(seeds) + positions)), 0, 4096, compiled)
    assert torch.equal(out, torch.from_numpy(compiled))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks per row."""
    monkeypatch.setattr(plans, "vocabulary", lambda *_: plans.Plan(block_n=128))


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([1, 5, 63, 257, 300]), coarse=st.booleans())
def test_equals_the_reference_and_the_cpu(seed: int, size: int, coarse: bool) -> None:
    """Ties and forbidden tokens included."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, size, generator=generator) * 3
    if coarse:
        logits = logits.round()
        logits[:, 1::3] = -torch.inf
    seeds = torch.randint(-(2**63), 2**63 - 1, (ROWS,), generator=generator)
    positions = torch.randint(0, 2**20, (ROWS,), generator=generator)
    drawn = sample.sample(logits, *OPTIONS, seeds, positions)
    assert drawn.tolist() == sample_reference(logits, *OPTIONS, seeds, positions).tolist()
    assert drawn.tolist() == sample_cpu(logits, *OPTIONS, seeds, positions).tolist()


def test_the_edge_among_equals() -> None:
    """Of five equal weights, top-k 2 and top-p 0.5 keep the first two and the first three."""
    logits, count = torch.tensor([[0.0, -20.0, 0.0, 0.0, -torch.inf, 0.0, 0.0]]).repeat(24, 1), 24
    top_k = torch.tensor([2, -1]).repeat_interleave(12)
    top_p = torch.tensor([1.0, 0.5]).repeat_interleave(12)
    drawn = sample.sample(
        logits, torch.ones(count), top_k, top_p, torch.zeros(count), torch.zeros(count).long(), torch.arange(count)
    )
    assert set(drawn[:12].tolist()) == {0, 2}
    assert set(drawn[12:].tolist()) == {0, 2, 3}


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.895, {0, 1, 2}), (0.905, {0, 1, 2, 3}), (0.505, {0, 1}), (0.495, {0})]
)
def test_the_edge_of_top_p(top_p: float, expected: set[int]) -> None:
    """Probabilities of 0.5, 0.3, 0.1, 0.06 and 0.04: a token is kept if those before it sum to less than ``top_p``."""
    count = 50
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]]).log().repeat(count, 1)
    drawn = sample.sample(
        logits, torch.ones(count), torch.full((count,), -1), torch.full((count,), top_p), torch.zeros(count),
        torch.zeros(count).long(), torch.arange(count),
    )  # fmt: skip
    assert set(drawn.tolist()) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-40])
def test_broken_rows_and_cold_ones(temperature: float) -> None:
    inf = torch.inf
    logits = torch.tensor([[0.0, torch.nan, 1], [0, inf, 1], [-inf, -inf, -inf], [0, 1, 2], [-0.0, 0.0, -1]])
    if temperature == 1.0:
        logits[3:] *= 100
    rows = len(logits)
    drawn = sample.sample(
        logits, torch.full((rows,), temperature), torch.full((rows,), -1), torch.ones(rows), torch.zeros(rows),
        torch.zeros(rows).long(), torch.zeros(rows).long(),
    )  # fmt: skip
    assert drawn[:4].tolist() == [-1, -1, -1, 2]
    assert drawn[4] in ([0] if temperature == 0 else [0, 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_vocabularies_in_a_strided_view(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 2, 7000, generator=torch.Generator().manual_seed(1)).to(dtype)[:, 1]
    options = (torch.ones(3), torch.tensor([40, -1, -1]), torch.tensor([1.0, 0.8, 1.0]), torch.zeros(3))
    seeds, positions = torch.arange(3), torch.arange(3)
    expected = sample_reference(logits, *options, seeds, positions)
    assert sample.sample(logits, *options, seeds, positions).tolist() == expected.tolist()
