"""The stage of the classification task: applies the score head to each sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from trunkline.core.errors import RequestError
from trunkline.core.types import Launched, Model, Needs, Part, Request, Stage, Step, sequence_starts

from .schemas import TASK, RewardParams, RewardResult

FINISH = {"type": "length", "length": 0}
NOT_FINITE = "The model's scores were not finite (NaN or infinity); the request was ended."


class RewardStage(Stage):
    """One vector of scores per sequence: of its last row in causal models, of its first or mean row in encoders.

    In causal models a sequence may be computed in chunks and use a cached prefix, because only its last row is
    needed. In encoders it is computed whole.
    """

    task = TASK
    heads = ("score",)
    params = RewardParams
    result = RewardResult

    def __init__(self, model: Model) -> None:
        self._model = model
        self._rows = model.info.score_rows

    def admit(self, request: Request) -> Needs:
        return Needs.of_rows(self._rows)

    def prepare(self, part: Part) -> None:
        part.arrays["starts"] = sequence_starts(part)

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        """Rows ``[R, hidden_size]`` of the part -> "scores" float32 ``[len(part.rows), labels]``."""
        pooled = self._model.backend.pool(hidden, part.tensors["starts"], self._rows)
        return Launched(tensors={"scores": self._model.heads["score"](pooled)})

    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        scores = tensors["scores"].numpy().astype("<f4", copy=False)
        finite = np.isfinite(scores).all(axis=-1)
        for row, own, fine in zip(part.rows, scores, finite, strict=True):
            if fine:
                yield Step(row.request, data=RewardResult(own.tobytes()), finish=FINISH)
            else:
                yield Step(row.request, error=RequestError(NOT_FINITE, status=500))

    def probe(self) -> tuple[list[int], RewardParams]:
        return [0], RewardParams()
