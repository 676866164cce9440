"""What crosses the process boundary, and what ``/generate`` takes."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

Int64 = Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)]
# Bounded, because they are copied for every sequence of a batch.
RequestId = Annotated[str, Meta(max_length=256)]
CacheKey = Annotated[str, Meta(max_length=1024)]
TokenId = Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)]  # the route checks the vocabulary and names it


class GenerationParams(Struct, frozen=True, omit_defaults=True):
    """How one sequence is generated; the engine's part of the request, values already checked.

    ``temperature`` 0 is greedy; ``top_k`` -1 and ``top_p`` 1 don't filter. ``seed`` with a token's
    position fixes its noise.
    """

    max_new_tokens: Annotated[int, Meta(ge=0, le=INT64_MAX)] = 128
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


class GenerateBody(Struct):
    """``POST /generate``. Unknown top-level fields are ignored; ``sampling_params`` are checked apart.

    Fields typed ``Any`` belong to features that aren't built yet: only their neutral values pass.
    """

    text: str | list[str] | None = None
    input_ids: list[TokenId | list[TokenId]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    rid: RequestId | list[RequestId] | None = None
    stream: bool | None = False
    model: str | None = None
    priority: Int64 | None = None
    extra_key: CacheKey | None = None
    cache_salt: CacheKey | None = None
    return_logprob: Any = None
    return_hidden_states: Any = None
    input_embeds: Any = None
    image_data: Any = None
    video_data: Any = None
    audio_data: Any = None
    lora_path: Any = None
    custom_logit_processor: Any = None
    session_params: Any = None
    session_id: Any = None
    return_prompt_token_ids: Any = None
    return_routed_experts: Any = None
    return_sampling_mask: Any = None
    max_thinking_tokens: Any = None
    watermark: Any = None
