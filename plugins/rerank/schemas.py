"""Parameters and results that are sent between front and engine, and a check that both do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from msgspec import Meta, Struct

from trunkline.core.errors import RequestError
from trunkline.core.types import Int64

MAX_LABELS = 4096  # limit on the label tokens of a request


class RerankParams(Struct, frozen=True, omit_defaults=True):
    """``labels``: the tokens whose logits are returned; () for models with a score head."""

    labels: Annotated[tuple[Int64, ...], Meta(max_length=MAX_LABELS)] = ()


class RerankResult(Struct, frozen=True):
    """``values``: little-endian float32.

    With a score head, its logit; else the logits of the labels, then the logsumexp over the whole vocabulary.
    """

    values: bytes


def check_labels(labels: Iterable[int], vocabulary: int) -> None:
    """RequestError if there are no labels, or one is outside the vocabulary."""
    known = list(labels)
    if not known:
        raise RequestError("label_token_ids must be provided", param="label_token_ids")
    for label in known:
        if not 0 <= label < vocabulary:
            raise RequestError(
                f"Token ID {label} is out of vocabulary (vocab size: {vocabulary})", param="label_token_ids"
            )
