"""Log-probabilities of both implementations against float64, with ties, forbidden ids and rows that aren't finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.kernels.cpu.sampling import logprobs as compiled
from trunkline.kernels.logprobs import RowLogprobs, logprobs_cpu, logprobs_reference
from trunkline.kernels.sample import sample_cpu, sample_reference

Kernel = Callable[..., RowLogprobs]
KERNELS = [logprobs_reference, logprobs_cpu]
LOWEST = torch.finfo(torch.float32).min


def ask(
    kernel: Kernel,
    logits: torch.Tensor,
    *,
    rows: list[int] | None = None,
    temperature: float = 0.0,
    top: int = 0,
    ids: list[int] | None = None,
    chosen: list[int] | None = None,
) -> RowLogprobs:
    """Every row with the same temperature and asked-for ids."""
    index = torch.arange(len(logits)) if rows is None else torch.tensor(rows, dtype=torch.int64)
    count = len(index)
    picked = torch.tensor(chosen, dtype=torch.int64) if chosen is not None else logits[index].argmax(-1)
    asked = torch.tensor(ids or [], dtype=torch.int64).expand(count, -1)
    return kernel(logits, index, torch.full((count,), temperature), picked, top, asked)


def random_logits(rows: int, size: int, seed: int = 0, *, coarse: bool = False) -> torch.Tensor:
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 4
    return logits.round() if coarse else logits


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [1, 2, 7, 511, 512, 513, 1024, 3001, 49152])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 7.0])
def test_values_are_those_of_log_softmax(kernel: Kernel, size: int, temperature: float) -> None:
    logits = random_logits(4, size, size)
    ids = [size - 1, 0, size // 2]
    found = ask(kernel, logits, temperature=temperature, top=5, ids=ids)
    expected = (logits.double() / (temperature or 1.0)).log_softmax(-1)
    best = expected.sort(dim=-1, descending=True, stable=True)
    k = min(5, size)
    assert found.top.shape == found.top_ids.shape == (4, k)
    assert (found.chosen - expected.amax(-1)).abs().max() < 1e-5
    assert (found.top - best.values[:, :k]).abs().max() < 1e-5
    assert torch.equal(found.top_ids, best.indices[:, :k].to(torch.int32))
    assert (found.ids - expected[:, ids]).abs().max() < 1e-5


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([1, 5, 63, 257, 1025, 3000]),
    top=st.sampled_from([0, 1, 2, 5, 50]),
    coarse=st.booleans(),
    forbidden=st.booleans(),
)
def test_cpu_equals_reference(seed: int, size: int, top: int, coarse: bool, forbidden: bool) -> None:
    """Ties and forbidden ids included: the same ids, and values of float32 accuracy."""
    logits = random_logits(6, size, seed, coarse=coarse)
    if forbidden:
        logits[:, 1::3] = -torch.inf
    options = {"rows": [5, 0, 0, 3], "top": top, "ids": [0, size - 1, -1, size]}
    for temperature in (0.0, 0.01, 1.0, 1e3, float("inf")):
        ours = ask(logprobs_cpu, logits, temperature=temperature, **options)  # type: ignore[arg-type]
        theirs = ask(logprobs_reference, logits, temperature=temperature, **options)  # type: ignore[arg-type]
        assert torch.equal(ours.top_ids, theirs.top_ids)
        for mine, other in zip((ours.chosen, ours.top, ours.ids), (theirs.chosen, theirs.top, theirs.ids), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_ranks_in_rising_order_are_found() -> None:
    """The worst case of the search: every logit is above all before it."""
    logits = torch.arange(5000.0).repeat(2, 1) / 100
    assert ask(logprobs_cpu, logits, top=50).top_ids[1].tolist() == list(range(4999, 4949, -1))


@pytest.mark.parametrize("forgotten", ["mass", "rank"])
def test_a_kernel_that_forgets_the_second_block_is_caught(forgotten: str) -> None:
    """Seeded bugs: the sum, or the search, ends after the first block."""

    def broken(logits: torch.Tensor, *arguments: Any) -> RowLogprobs:
        whole, part = logprobs_cpu(logits, *arguments), logprobs_cpu(logits[:, : compiled.BLOCK], *arguments)
        return part if forgotten == "mass" else whole._replace(top_ids=part.top_ids)

    with pytest.raises(AssertionError):
        test_values_are_those_of_log_softmax(broken, 1024, 1.0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_greedy_id_is_the_first_of_the_most_likely(kernel: Kernel) -> None:
    """Bit for bit, ties included, also of 0.0 and -0.0."""
    logits = torch.cat([random_logits(40, 3000, coarse=True), torch.tensor([[-0.0, 0.0, -1.0] + [-2.0] * 2997])])
    plain = torch.zeros(len(logits))
    sampler = sample_cpu if kernel is logprobs_cpu else sample_reference
    greedy = sampler(logits, plain, plain.long() - 1, plain + 1, plain, plain.long(), plain.long())
    found = ask(kernel, logits, top=3, chosen=greedy.tolist())
    assert found.top_ids[:, 0].tolist() == greedy.tolist()
    assert torch.equal(found.top[:, 0], found.chosen)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_id_has_the_same_bits_wherever_it_stands(kernel: Kernel) -> None:
    logits = random_logits(8, 700)
    found = ask(kernel, logits, temperature=0.7, top=700, ids=list(range(700)))
    assert torch.equal(found.ids.gather(-1, found.top_ids.long()), found.top)


@pytest.mark.parametrize("kernel", KERNELS)
def test_forbidden_ids_are_minus_infinity_where_greedy_and_the_lowest_number_elsewhere(kernel: Kernel) -> None:
    logits = torch.tensor([[1.0, -torch.inf, 2.0]])
    assert ask(kernel, logits, top=3, ids=[1]).ids.tolist() == [[-torch.inf]]
    found = ask(kernel, logits, temperature=0.5, top=3, ids=[1])
    assert found.ids.tolist() == [[LOWEST]]
    assert found.top_ids.tolist() == [[2, 0, 1]]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_give_nan_and_harm_no_other(kernel: Kernel, temperature: float) -> None:
    logits = random_logits(5, 40)
    logits[0, 7] = torch.nan
    logits[1, 7] = torch.inf
    logits[2] = -torch.inf
    logits[3, :39] = -torch.inf
    found = ask(kernel, logits, temperature=temperature, top=2, ids=[3], chosen=[-1, -1, -1, 39, 0])
    for values in (found.chosen, found.top[:, 0], found.ids[:, 0]):
        assert torch.isnan(values[:3]).all()
        assert not torch.isnan(values[3:]).any()
    assert found.chosen[3] == 0.0


@pytest.mark.parametrize("kernel", KERNELS)
def test_only_the_rows_that_ask_are_answered(kernel: Kernel) -> None:
    logits = random_logits(6, 100)
    every, some = ask(kernel, logits, top=2), ask(kernel, logits, rows=[4, 1], top=2)
    assert torch.equal(some.top, every.top[[4, 1]])
    assert ask(kernel, logits, rows=[], chosen=[], top=2).top.shape == (0, 2)
