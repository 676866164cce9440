"""What the routes answer."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from msgspec import Meta, Struct


class ExpertQuery(Struct):
    """The query of the routes that start, stop and dump the record."""

    model: Annotated[str, Meta(description="A served name or alias; by default the first model.")] = ""
    format: Annotated[Literal["json", "text"] | None, Meta(description="By default what Accept asks for.")] = None


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
    """Which experts tokens were sent to, by layer."""

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
