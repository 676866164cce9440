"""Names of labels and probabilities of scores, according to a checkpoint's config."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def label_of(config: dict[str, Any], index: int) -> str:
    """The label's name in ``id2label``, else ``LABEL_0`` and so on."""
    names = config.get("id2label") or {}
    return str(names.get(str(index), f"LABEL_{index}"))


def probabilities(config: dict[str, Any], scores: Array) -> Array:
    """Scores ``[labels]`` -> probabilities, by ``problem_type``.

    Multi-label classification and single labels use a sigmoid, others a softmax. Scores of a regression
    are no logits and are returned unchanged.
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
