"""What crosses the process boundary."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from trunkline.core.types import INT64_MAX, Count, Int64, TokenId


class GenerationParams(Struct, frozen=True, omit_defaults=True):
    """How one sequence is generated; the engine's part of the request, values already checked.

    ``temperature`` 0 is greedy; ``top_k`` -1 and ``top_p`` 1 don't filter. ``seed`` with a token's
    position fixes its noise.
    """

    max_new_tokens: Count = 128
    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=INT64_MAX)] = -1
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Int64 = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[TokenId, ...] = ()
    ignore_eos: bool = False


class GenerationResult(Struct, frozen=True):
    """A token's data beside its id: none yet (token ids travel in ``Step.tokens``)."""
