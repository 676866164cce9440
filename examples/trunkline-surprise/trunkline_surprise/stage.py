"""The task in the engine: sum up -log2 p(token | tokens before it)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from msgspec import Struct

from trunkline.core.errors import RequestError
from trunkline.core.types import Launched, Model, Needs, Part, PartRow, Request, Stage, Step

SLICE = 256  # rows of logits held at a time


class SurpriseParams(Struct, frozen=True):
    """There are no parameters."""


class Surprise(Struct, frozen=True):
    bits: float  # of the whole text after its first token


class SurpriseStage(Stage):
    """Doesn't decode. Needs the hidden row of every token, so no cached prefix is reused."""

    task = "surprise"
    heads = ("lm",)  # core's own: the logits as the model's class computes them
    params = SurpriseParams
    result = Surprise

    def __init__(self, model: Model) -> None:
        self._logits = model.heads["lm"]

    def admit(self, request: Request) -> Needs:
        if request.prompt_len < 2:
            raise RequestError("The text needs at least two tokens.", param="text")
        request.state = 0.0
        return Needs(rows_from=0, reuse_up_to=0)

    def reset(self, request: Request) -> None:
        request.state = 0.0

    def prepare(self, part: Part) -> None:
        part.arrays["targets"] = np.array([token for row in part.rows for token in followers(row)], np.int64)

    def launch(self, part: Part, hidden: torch.Tensor) -> Launched:
        slices = [
            torch.nn.functional.cross_entropy(self._logits(rows).float(), ids, ignore_index=-1, reduction="none")
            for rows, ids in zip(hidden.split(SLICE), part.tensors["targets"].split(SLICE), strict=True)
        ]
        return Launched(tensors={"nats": torch.cat(slices)})

    def collect(self, part: Part, tensors: Mapping[str, torch.Tensor]) -> Iterable[Step]:
        for row in part.rows:
            nats = tensors["nats"][row.offset : row.offset + row.stop - row.first]
            row.request.state += float(nats.sum()) / math.log(2)
            if row.final:
                yield Step(row.request, data=Surprise(row.request.state), finish={"type": "stop"})

    def probe(self) -> tuple[list[int], Struct]:
        return [1, 2], SurpriseParams()


def followers(row: PartRow) -> list[int]:
    """The token after each of the row's positions; -1 after the last one."""
    tokens = row.request.tokens[row.first + 1 : row.stop + 1]
    return tokens + [-1] * (row.stop - row.first - len(tokens))
