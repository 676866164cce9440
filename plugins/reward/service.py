"""Computes the scores of a request; used by the routes of both dialects and from Python."""

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
    check_batch_size,
    item_meta,
    prepare_inputs,
    submit_and_wait,
)
from trunkline.core.types import EngineClient, Reply, ServedModel, Settings

from .labels import Array
from .schemas import TASK, RewardParams, RewardResult


@dataclass(frozen=True, slots=True)
class ScoredInputs:
    """The scores of one request, in the order of its inputs."""

    served: ServedModel
    items: list[PreparedInput]
    replies: list[Reply]

    def scores(self) -> list[Array]:
        """Of each input, float32 ``[labels]``."""
        return [scores_of(reply.data) for reply in self.replies]

    def metas(self) -> list[ItemMeta]:
        pairs = zip(self.replies, self.items, strict=True)
        return [item_meta(reply, self.served, item, cached=True) for reply, item in pairs]


class Service:
    """The classification task in the front: checks limits, tokenises, submits."""

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
    ) -> ScoredInputs:
        """Compute the scores. RequestError for an invalid request, before anything is computed."""
        served = self.engine.choose(TASK, model)
        check_batch_size(len(inputs), self._max_batch, inputs.field)
        rids = assign_rids(rid, len(inputs), single=inputs.single, number=False)
        items = await prepare_inputs(self.engine, served, inputs, truncate=truncate)
        replies = await submit_and_wait(
            self.engine, served, TASK, items, RewardParams(), rids,
            priority=priority or 0, salt=salt, single=inputs.single, field=inputs.field,
        )  # fmt: skip
        return ScoredInputs(served, items, replies)


def scores_of(data: Any) -> Array:
    """The float32 scores of a stage's result."""
    return np.frombuffer(msgspec.convert(data, RewardResult).scores, np.dtype("<f4"))
