"""Names of the reward task. It has no settings of its own."""

from __future__ import annotations

TASK = "reward"
