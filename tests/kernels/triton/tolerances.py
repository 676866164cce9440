"""How far a kernel's result may be from the float64 reference on the same inputs."""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
"""Relative errors of results that are computed in float32 and rounded once: a unit in the last place."""


def assert_rounded_once(result: torch.Tensor, expected: torch.Tensor) -> None:
    """``result`` is ``expected``, float64, computed in float32 and rounded to its dtype."""
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=ONCE[result.dtype])
