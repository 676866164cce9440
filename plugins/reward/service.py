"""From what a body asks for to scores; both dialects' routes go through here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from trunkline.core.server.api import (
    Inputs,
    ItemMeta,
    PreparedInput,
    Truncation,
    assign_rids,
    check_batch,
    item_meta,
    prepare_inputs,
    run_all,
)
from trunkline.core.types import EngineClient, Reply, ServedModel, Settings

from .labels import Array
from .schemas import TASK, RewardParams, RewardResult


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of one request, in its order."""

    served: ServedModel
    items: list[PreparedInput]
    replies: list[Reply]

    def scores(self) -> list[Array]:
        """Float32 ``[labels]`` each."""
        return [scores_of(reply.data) for reply in self.replies]

    def metas(self) -> list[ItemMeta]:
        pairs = zip(self.replies, self.items, strict=True)
        return [item_meta(reply, self.served, item, cached=True) for reply, item in pairs]


class Service:
    """The front's part of classification: limits, tokenising, submitting."""

    def __init__(self, engine: EngineClient, settings: Settings) -> None:
        self.engine = engine
        self._max_batch: int = settings["server"].max_batch_size

    async def score(
        self,
        inputs: Inputs,
        *,
        model: str | None = None,
        truncate: Truncation = None,
        rid: str | list[str] | None = None,
        priority: int | None = None,
        salt: bytes = b"",
    ) -> Scored:
        """Compute. RequestError for whatever is wrong with the request; then nothing was computed."""
        served = self.engine.choose(TASK, model)
        check_batch(len(inputs), self._max_batch, inputs.field)
        rids = assign_rids(rid, len(inputs), single=inputs.single, number=False)
        items = await prepare_inputs(self.engine, served, inputs, truncate=truncate)
        replies = await run_all(
            self.engine, served, TASK, items, RewardParams(), rids,
            priority=priority or 0, salt=salt, single=inputs.single, field=inputs.field,
        )  # fmt: skip
        return Scored(served, items, replies)


def scores_of(data: Any) -> Array:
    """The float32 scores in a stage's result."""
    return np.frombuffer(msgspec.convert(data, RewardResult).scores, np.dtype("<f4"))
