"""Parameters and results that are sent between front and engine."""

from __future__ import annotations

from msgspec import Struct

TASK = "reward"


class RewardParams(Struct, frozen=True):
    """No parameters: activations are applied in the front."""


class RewardResult(Struct, frozen=True):
    """``scores``: float32, little endian, one per label, without activation."""

    scores: bytes
