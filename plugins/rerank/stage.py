"""The stages of the rerank task: one score per sequence, from a score head or from the logits of answer tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from trunkline.core.errors import RequestError
from trunkline.core.types import Launched, Model, Needs, Part, Request, Stage, Step, sequence_starts

from .schemas import RerankParams, RerankResult, check_labels
from .settings import TASK

SLICE_BYTES = 64 << 20  # limit on float32 logits in memory at a time
FINISH = {"type": "length", "length": 0}


class ScoreStage(Stage):
    """For models with a score head, which is applied to the first, last or mean row, depending on the class."""

    task = TASK
    heads = ("score",)
    params = RerankParams
    result = RerankResult

    def __init__(self, model: Model) -> None:
        self._model = model
        self._rows = model.info.score_rows

    def admit(self, request: Request) -> Needs:
        return Needs.of_rows(self._rows)

    def prepare(self, part: Part) -> None:
        part.arrays["starts"] = sequence_starts(part)

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        pooled = self._model.backend.pool(hidden, part.tensors["starts"], self._rows)
        return Launched(tensors={"values": self._model.heads["score"](pooled)})

    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        for row, values in zip(part.rows, tensors["values"], strict=True):
            yield result(row.request, values)

    def probe(self) -> tuple[list[int], RerankParams]:
        return [0, 1], RerankParams()


class LabelStage(Stage):
    """For causal models: the logits of the request's label tokens at its last position."""

    task = TASK
    heads = ("lm",)
    params = RerankParams
    result = RerankResult

    def __init__(self, model: Model) -> None:
        self._model = model
        self._vocabulary = model.info.vocab_size
        self._values = model.backend.row_invariant(self._label_values)

    def admit(self, request: Request) -> Needs:
        check_labels(request.params.labels, self._vocabulary)
        return Needs()

    def prepare(self, part: Part) -> None:
        """Label ids ``[R, largest number of labels]``; rows with fewer labels are padded with id 0."""
        labels = [row.request.params.labels for row in part.rows]
        width = max(map(len, labels))
        part.arrays["labels"] = np.array([(*ids, *[0] * (width - len(ids))) for ids in labels], np.int64)

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        labels = part.tensors["labels"]
        rows = max(1, SLICE_BYTES // (4 * self._vocabulary))
        slices = zip(torch.split(hidden, rows), torch.split(labels, rows), strict=True)
        pieces = [self._values(some, ids) for some, ids in slices]
        return Launched(tensors={"values": torch.cat(pieces)})

    def _label_values(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logsumexp over the vocabulary, then the labels' logits: float32 ``[R, 1 + labels]``."""
        logits = self._model.heads["lm"](hidden).float()
        return torch.cat([logits.logsumexp(-1, keepdim=True), logits.gather(1, labels)], 1)

    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        for row, values in zip(part.rows, tensors["values"], strict=True):
            count = len(row.request.params.labels)
            yield result(row.request, torch.cat([values[1 : 1 + count], values[:1]]))

    def probe(self) -> tuple[list[int], RerankParams]:
        return [0], RerankParams((0,))


def result(request: Request, values: torch.Tensor) -> Step:
    """The last step of a request, with its float32 values; an error if one isn't finite."""
    if not bool(values.isfinite().all()):
        return Step(request, error=RequestError("The model's score is not finite (NaN or infinity).", status=500))
    return Step(request, data=RerankResult(values.numpy().astype("<f4").tobytes()), finish=dict(FINISH))
