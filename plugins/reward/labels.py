"""What a checkpoint's config says about its scores: the labels' names, and how scores become probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def label_of(config: dict[str, Any], index: int) -> str:
    """``id2label``'s name of a label, ``LABEL_0`` and so on without one."""
    names = config.get("id2label") or {}
    return str(names.get(str(index), f"LABEL_{index}"))


def probabilities(config: dict[str, Any], scores: Array) -> Array:
    """Scores ``[labels]`` -> probabilities, by ``problem_type``.

    Labels that don't exclude each other and single labels go through a sigmoid, all others through
    a softmax. Scores of a regression are no logits and stay as they are.
    """
    kind = config.get("problem_type")
    if kind == "regression":
        return scores
    if kind == "multi_label_classification" or len(scores) == 1:
        exponential = np.exp(-np.abs(scores))  # never overflows
        upper = np.where(scores >= 0, np.float32(1), exponential)
        return np.asarray(upper / (1 + exponential), np.float32)
    exponential = np.exp(scores - scores.max())
    return np.asarray(exponential / exponential.sum(), np.float32)
