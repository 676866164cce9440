"""Schemas of the replies of ``/generate``, for type checkers and for ``/openapi.json``."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from trunkline.core.server.api import FinishReason

LogprobEntry = tuple[float | None, int, str | None]
"""Log-probability, token id, and the token's text with ``return_text_in_logprobs``."""


class WeightSpan(TypedDict):
    """The output tokens ``[start, end)`` were generated with the weights labelled ``version``."""

    version: str
    start: int
    end: int


class GenerateMeta(TypedDict):
    """``meta_info`` of a sequence. ``finish_reason`` is null while it runs.

    Lists of log-probabilities have an item for each token. The prompt's first token has no log-probability.
    """

    id: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    weight_version: str
    completion_tokens: int
    cached_tokens: int
    weight_versions: NotRequired[list[WeightSpan]]  # if weights were updated while it was paused
    input_token_logprobs: NotRequired[list[LogprobEntry]]
    output_token_logprobs: NotRequired[list[LogprobEntry]]
    input_top_logprobs: NotRequired[list[list[LogprobEntry] | None]]  # most likely first
    output_top_logprobs: NotRequired[list[list[LogprobEntry] | None]]
    input_token_ids_logprobs: NotRequired[list[list[LogprobEntry] | None]]  # in the order of token_ids_logprob
    output_token_ids_logprobs: NotRequired[list[list[LogprobEntry] | None]]
    hidden_states: NotRequired[list[Any]]  # a matrix, then vectors; or one vector (not expressible in the schema)
    routed_experts: NotRequired[str]  # base64 of int32 [positions, layers, experts per token], at the end
    e2e_latency: NotRequired[float]  # seconds; at the end


class GenerateRecord(TypedDict):
    """A sequence in SGLang's native API. In a stream, records are cumulative; ``index`` is that of the sequence."""

    text: NotRequired[str]
    output_ids: list[int]
    prompt_token_ids: NotRequired[list[int]]  # with return_prompt_token_ids
    meta_info: GenerateMeta
    index: NotRequired[int]
