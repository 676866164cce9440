"""A group of checks whose errors parity.py reports together, and how an error is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

# Largest relative error of one rounding.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Item(NamedTuple):
    """``inputs``: dtype, and the head dim of attention. ``bound``: of the largest error; ``reason`` of the bound."""

    operation: str
    inputs: str
    bound: float
    reason: str
    checks: Sequence[Callable[[], float]]


def name_of(dtype: torch.dtype) -> str:
    """``float32``, …"""
    return str(dtype).removeprefix("torch.")


def largest_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest ``|result - expected| / (1 + |expected|)``; infinity where only one of them is NaN or infinite."""
    result, expected = result.double(), expected.double()
    same = (result == expected) | (result.isnan() & expected.isnan())
    error = ((result - expected).abs() / (1 + expected.abs())).masked_fill(same, 0.0)
    largest = float(error.nan_to_num(nan=math.inf).max()) if error.numel() else 0.0
    return largest


def unequal(result: torch.Tensor, expected: torch.Tensor) -> float:
    """The share of numbers that differ."""
    return float((result != expected).double().mean())
