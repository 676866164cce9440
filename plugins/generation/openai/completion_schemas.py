"""What ``/v1/completions`` takes."""

from __future__ import annotations

from typing import Annotated, Any

from trunkline.core.server.api import IgnoredAccountingField, Refused, Unsupported, UnsupportedUnlessNull
from trunkline.core.types import Int64, TokenId

from .body_schemas import CommonBody


class CompletionBody(CommonBody, kw_only=True):
    """OpenAI's request for a completion of one prompt or several, each of which is a text or a list of token ids."""

    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool | None = False
    logprobs: Int64 | None = None
    best_of: Int64 | None = None
    add_special_tokens: bool | None = None  # default: true
    suffix: Annotated[
        Any, Refused("{field} is not supported: models here continue a prompt, they don't fill gaps.")
    ] = None
    prompt_logprobs: Annotated[
        Any, Refused("{field} is not supported; echo with logprobs returns those of the prompt.", empty=False)
    ] = None
    prompt_embeds: Annotated[Any, Refused("{field} is not supported; /generate takes input_embeds.")] = None
    return_spec_tokens_details: Unsupported = None
    max_thinking_tokens: UnsupportedUnlessNull = None
    watermark: Unsupported = None
    custom_labels: IgnoredAccountingField = None
