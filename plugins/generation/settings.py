"""Settings of the generation task: TOML table ``[generation]`` and flags."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from trunkline.core.types import ServedModel

TASK = "generation"
GROUP = "generation"
RESERVED = 2  # tokens of the context that SGLang never gives out; kept so that lengths agree
INPUT_RESERVE = 6  # tokens under the limit that an input must leave free, as SGLang has it


class GenerationSettings(Struct, frozen=True):
    """Every field is a flag: ``max_n`` is ``--max-n``."""

    preferred_sampling_params: Annotated[
        str | None,
        Meta(description="Sampling defaults as a JSON object, e.g. '{\"temperature\": 0}'; a request overrides them."),
    ] = None
    stream_interval: Annotated[int, Meta(ge=1, le=4096, description="Send a stream frame every so many tokens.")] = 1
    enable_return_hidden_states: Annotated[
        bool, Meta(description="Let requests ask for hidden states (return_hidden_states).")
    ] = False
    max_n: Annotated[int, Meta(ge=1, le=1024, description="Most samples (n) of one prompt in a request.")] = 64
    sampling_defaults: Annotated[
        Literal["model", "openai"],
        Meta(description="Chat sampling defaults: the model's generation_config.json, or OpenAI's (temperature 0.7)."),
    ] = "model"


def input_limit(served: ServedModel) -> int:
    """A prompt must have fewer tokens than this."""
    return served.max_request_tokens - INPUT_RESERVE


def new_token_limit(prompt_len: int, wanted: int, max_request_tokens: int) -> int:
    """``max_new_tokens`` as far as the context allows."""
    return max(0, min(wanted, max_request_tokens - RESERVED - prompt_len))
