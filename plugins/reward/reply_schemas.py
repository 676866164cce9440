"""The replies of the routes."""

from __future__ import annotations

from typing import Literal, TypedDict

from trunkline.core.server.api import ItemMeta, TruncationReport, Usage


class ClassifyRecord(TypedDict):
    """An input's scores in the reply of ``/classify``, one per label."""

    embedding: list[float]
    meta_info: ItemMeta


class LabelEntry(TruncationReport):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class LabelsReply(TypedDict):
    """vLLM's list of labels."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[LabelEntry]
    usage: Usage
