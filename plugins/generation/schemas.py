"""What crosses the process boundary."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from trunkline.core.types import INT64_MAX, Count, Int64, TokenId

Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-1e9, le=1e9)]


class LogprobParams(Struct, frozen=True, omit_defaults=True):
    """Which log-probabilities to send: of the prompt's tokens from ``start`` on (None: none), and of each output
    token; with the ``top`` most likely ids and the given ``ids``."""

    start: Count | None = None
    top: Count = 0
    ids: tuple[TokenId, ...] = ()


class GenerationParams(Struct, frozen=True, omit_defaults=True):
    """How one sequence is generated; the engine's part of the request, values already checked.

    ``temperature`` 0 is greedy; ``top_k`` -1 and ``top_p`` 1 don't filter. ``seed`` with a token's
    position fixes its noise. ``hidden_states``: those of all positions that are computed, or of the last one.
    ``experts_from``: the position from which on to tell which experts tokens went to.
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
    min_new_tokens: Count = 0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=2)] = 1.0
    logit_bias: tuple[tuple[TokenId, Bias], ...] = ()
    stop_regex: tuple[str, ...] = ()
    custom_params: dict[str, Any] | None = None
    logprobs: LogprobParams | None = None
    hidden_states: Literal["", "last", "all"] = ""
    experts_from: Count | None = None


class LogprobTable(Struct, frozen=True, array_like=True):
    """Log-probabilities of rows, little-endian: of the chosen id ``[R]``, the ``top`` ids and theirs ``[R, top]``,
    those of the asked-for ``ids`` ``[R, len(ids)]``; int32 and float32. NaN where there is none. ``chosen_ids``:
    what was chosen, of output rows; those of the prompt are its tokens."""

    chosen: bytes
    top_ids: bytes = b""
    top: bytes = b""
    ids: bytes = b""
    chosen_ids: bytes = b""


class GenerationResult(Struct, frozen=True, omit_defaults=True):
    """Data beside token ids (which travel in ``Step.tokens``), of those requests only that ask for some.

    ``output``: one row per token that was sampled. ``prompt``: rows of a chunk, the first for the token at position
    ``first``. ``hidden``: float32 ``[rows, hidden_size]`` of positions from ``hidden_at`` on. ``experts``: int32
    ``[positions, layers, k]``, when the sequence has ended. What is long comes in several results.
    """

    output: LogprobTable | None = None
    prompt: LogprobTable | None = None
    first: Count = 0
    hidden: bytes = b""
    hidden_at: Count = 0
    experts: bytes = b""
