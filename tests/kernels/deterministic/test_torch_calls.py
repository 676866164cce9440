"""torch's operations in row-invariant functions: right, and a row has the same bits in any batch, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trunkline.kernels.deterministic import torch_calls
from trunkline.kernels.deterministic.torch_calls import NotRowInvariantError, row_invariant

WIDTH = 37
Rows = Callable[[torch.Tensor], torch.Tensor]
NOISE = torch.Generator().manual_seed(0)
WEIGHT = nn.Parameter(torch.randn(24, WIDTH, generator=NOISE), requires_grad=False)
BIAS = torch.randn(24, generator=NOISE)
SCALE, SHIFT = torch.randn(WIDTH, generator=NOISE), torch.randn(WIDTH, generator=NOISE)
OPERATIONS: dict[str, Rows] = {
    **{name: getattr(torch, name) for name in ("exp", "sin", "cos", "tanh", "sigmoid", "erf", "rsqrt", "log1p")},
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "cube": lambda x: x**3,
    "power": lambda x: 10000.0 ** (-x / 8),
    "square": lambda x: x.pow(2),
    "sum": lambda x: x.sum(-1),
    "sum of another dimension": lambda x: x.view(len(x), -1, 1, 1).sum(1)[:, 0],
    "mean": lambda x: x.mean(-1, keepdim=True),
    "softmax": lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
    "logsumexp": lambda x: x.logsumexp(-1, keepdim=True),
    "normalize": lambda x: F.normalize(x, p=2, dim=-1),
    "layer_norm": lambda x: F.layer_norm(x, (WIDTH,), SCALE.to(x.dtype), SHIFT.to(x.dtype)),
    "rms_norm": lambda x: F.rms_norm(x, (WIDTH,), SCALE.to(x.dtype), 1e-6),
    "linear": lambda x: F.linear(x, WEIGHT.to(x.dtype), BIAS.to(x.dtype)),
    "matmul": lambda x: x.float() @ WEIGHT.t(),
    "addmm": lambda x: torch.addmm(BIAS, x.float(), WEIGHT.t()),
    "outer product": lambda x: x[:, :, None] @ x[:, None, :1],
}
REFUSED: dict[str, Rows] = {
    "product of two activations": lambda x: x @ x.t(),
    "sum of everything": lambda x: x.sum(),
    "sum over rows": lambda x: x.cumsum(0),
    "polar": lambda x: torch.polar(x, x),
    "einsum": lambda x: torch.einsum("td,nd->tn", x, WEIGHT),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "scatter_add": lambda x: x.scatter_add(0, torch.zeros(1, WIDTH, dtype=torch.int64), x),
    "scatter": lambda x: x.scatter(0, torch.zeros(1, WIDTH, dtype=torch.int64), x, reduce="add"),
    "exp_": lambda x: x.exp_(),
}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Threads divide what they compute at other places than one does."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def rows(dtype: torch.dtype, count: int = 1001) -> torch.Tensor:
    """Positive numbers, for roots and logarithms, in more rows than one thread computes."""
    return (torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(2)).abs() + 0.1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_any_batch(name: str, dtype: torch.dtype) -> None:
    x, operation = rows(dtype), OPERATIONS[name]
    together, expected = row_invariant(operation)(x), operation(x)
    torch.testing.assert_close(together, expected, **({} if dtype == torch.bfloat16 else {"atol": 2e-5, "rtol": 2e-5}))
    for some in (slice(0, 1), slice(3, 4), slice(1000, 1001), slice(7, 90), slice(1, 1001)):
        assert torch.equal(row_invariant(operation)(x[some].clone()), together[some])


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_operations_are_refused(name: str) -> None:
    with torch.inference_mode(), pytest.raises(NotRowInvariantError):
        row_invariant(REFUSED[name])(rows(torch.float32, 5))


def test_integers_are_exact() -> None:
    counts = row_invariant(lambda x: x.cumsum(0).sum())(torch.arange(5))
    assert int(counts) == 20


def test_operations_outside_are_unchanged() -> None:
    x = rows(torch.float32, 5)
    row_invariant(torch.exp)(x)
    assert (x @ x.t()).shape == (5, 5)


def test_packed_weights_are_those_of_the_parameter() -> None:
    """Not of an earlier one, whose memory is used again; and what is kept ends with it."""
    before = len(torch_calls._packed)
    for number in range(5):
        weight: Any = nn.Parameter(torch.full((16, 8), float(number)), requires_grad=False)
        assert torch_calls.packed(weight) is torch_calls.packed(weight)
        assert torch.equal(torch_calls.packed(weight).forward(torch.ones(1, 8)), torch.full((1, 16), 8.0 * number))
        del weight
    assert len(torch_calls._packed) <= before + 2
