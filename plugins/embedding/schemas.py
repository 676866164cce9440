"""Parameters and results that are sent between front and engine."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

MAX_TOKENS = 1 << 31  # upper bound on token counts and vector lengths

Dimensions = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]


class EmbeddingParams(Struct, frozen=True, omit_defaults=True):
    """How the vector of a sequence is computed.

    The first ``skip`` tokens (a prompt) aren't pooled. ``normalize``: None = the model's default.
    ``dimensions``: the vector is cut to this length before it is normalised.
    """

    skip: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] = 0
    normalize: bool | None = None
    dimensions: Dimensions | None = None


class EmbeddingResult(Struct, frozen=True):
    """``vector``: float32, little endian."""

    vector: bytes
