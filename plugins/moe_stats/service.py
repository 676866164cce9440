"""Runs controls and returns snapshots; used by all routes and from Python."""

from __future__ import annotations

import msgspec

from trunkline.core.server.api import AnyRequest, InvalidBody, named_or_primary
from trunkline.core.types import EngineClient, on_each_replica

from .schemas import Snapshot


class Service:
    """Expert statistics in the front."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    async def run(self, control: str, model: str | None) -> Snapshot:
        """Run a control on a model, by default on the primary one. With several engine replicas, on each: the sum.

        RequestError 400 for an unknown name and for a model that can't be recorded.
        """
        served = named_or_primary(self._engine.models, model)
        answers = await on_each_replica(
            self._engine, lambda: self._engine.call(control, model=served.name), served.name
        )
        snapshots = msgspec.convert(answers, dict[str, Snapshot])
        return snapshots.get("") or added(snapshots)


def added(snapshots: dict[str, Snapshot]) -> Snapshot:
    """The sum of the snapshots of several engine replicas; ``recording`` if all do."""
    every = [*snapshots.values()]
    layers = zip(*(one.counts for one in every), strict=True)
    return msgspec.structs.replace(
        every[0],
        recording=all(one.recording for one in every),
        passes=sum(one.passes for one in every),
        tokens=sum(one.tokens for one in every),
        top_k=max(one.top_k for one in every),
        counts=[[sum(counts) for counts in zip(*layer, strict=True)] for layer in layers],
        unrecorded=sum(one.unrecorded for one in every),
        file="",
        replicas=snapshots,
    )


def model_of(request: AnyRequest) -> str | None:
    """The query parameter ``model``."""
    return request.query_params.get("model")


def wants_json(request: AnyRequest) -> bool:
    """Whether the client wants JSON, by ``?format=`` or its Accept header. InvalidBody for another format."""
    given = request.query_params.get("format")
    if given not in (None, "json", "text"):
        raise InvalidBody(f"format must be 'json' or 'text', got {given!r}.")
    return given == "json" or (given is None and "application/json" in request.headers.get("accept", ""))
