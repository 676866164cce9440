"""What crosses the process boundary, and what both processes check of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from msgspec import Meta, Struct

from trunkline.core.errors import RequestError
from trunkline.core.types import Int64

MAX_LABELS = 4096  # label tokens of one request


class RerankParams(Struct, frozen=True, omit_defaults=True):
    """``labels``: the answer tokens whose logits are wanted; none for models with a score head."""

    labels: Annotated[tuple[Int64, ...], Meta(max_length=MAX_LABELS)] = ()


class RerankResult(Struct, frozen=True):
    """``values``: little-endian float32.

    With a score head its logit; else the logits of the labels and the logsumexp over the whole
    vocabulary after them.
    """

    values: bytes


def check_labels(labels: Iterable[int], vocabulary: int) -> None:
    """RequestError for no labels, or ones outside the vocabulary."""
    known = list(labels)
    if not known:
        raise RequestError("label_token_ids must be provided", param="label_token_ids")
    for label in known:
        if not 0 <= label < vocabulary:
            raise RequestError(
                f"Token ID {label} is out of vocabulary (vocab size: {vocabulary})", param="label_token_ids"
            )
