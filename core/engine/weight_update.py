"""What a weight update replaces in a lane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trunkline.core.types import ServedModel

from .candidates import Candidate
from .contracts import CheckedStage
from .runner import Runner


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """All that a weight update replaces in a lane."""

    candidate: Candidate
    served: ServedModel
    model: Any
    stages: Mapping[str, CheckedStage]
    runner: Runner
