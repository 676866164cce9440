"""The replies of the routes."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from msgspec import Meta, Struct


class ExpertQuery(Struct):
    """Query parameters of the routes that start, stop and dump the record."""

    model: Annotated[str, Meta(description="A served name or alias; by default the first model.")] = ""
    format: Annotated[
        Literal["json", "text"] | None, Meta(description="By default according to the header Accept.")
    ] = None


class BusyExpert(TypedDict):
    expert: int
    count: int
    share: float


class LayerReport(TypedDict):
    layer: int
    selections: int
    balancedness: float | None
    top: list[BusyExpert]
    counts: list[int]


class Report(TypedDict):
    """How often tokens were sent to each expert, by layer; with several engine replicas, in all, and in each."""

    model: str
    mode: str
    recording: bool
    passes: int
    tokens: int
    top_k: int
    num_layers: int
    num_experts: int
    balancedness: float | None
    passes_without_record: int
    layers: list[LayerReport]
    message: NotRequired[str]
    file: NotRequired[str]
    replicas: NotRequired[dict[str, Report]]
