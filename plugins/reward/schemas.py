"""What crosses the process boundary."""

from __future__ import annotations

from msgspec import Struct

TASK = "reward"


class RewardParams(Struct, frozen=True):
    """Nothing to choose: the activation is the front's work."""


class RewardResult(Struct, frozen=True):
    """``scores``: float32, little endian, one a label, as the head gives them."""

    scores: bytes
