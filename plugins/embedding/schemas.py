"""What crosses the process boundary."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

MAX_TOKENS = 1 << 31  # outer bound of token counts and vector lengths

Dimensions = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]


class EmbeddingParams(Struct, frozen=True, omit_defaults=True):
    """How one sequence becomes a vector; the engine's part of the request.

    The first ``skip`` tokens (a prompt) aren't pooled. ``normalize`` None does as the model does.
    ``dimensions`` cuts the vector, before it is normalised.
    """

    skip: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] = 0
    normalize: bool | None = None
    dimensions: Dimensions | None = None


class EmbeddingResult(Struct, frozen=True):
    """``vector``: float32, little endian."""

    vector: bytes
