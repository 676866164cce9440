"""Settings of the generation task: TOML table ``[generation]`` and flags."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

TASK = "generation"
GROUP = "generation"


class GenerationSettings(Struct, frozen=True):
    """Every field is a flag: ``max_n`` is ``--max-n``."""

    preferred_sampling_params: Annotated[
        str | None,
        Meta(description="Sampling defaults as a JSON object, e.g. '{\"temperature\": 0}'; a request overrides them."),
    ] = None
    stream_interval: Annotated[int, Meta(ge=1, le=4096, description="Send a stream frame every so many tokens.")] = 1
    max_n: Annotated[int, Meta(ge=1, le=1024, description="Most samples (n) of one prompt in a request.")] = 64
    sampling_defaults: Annotated[
        Literal["model", "openai"],
        Meta(description="Chat sampling defaults: the model's generation_config.json, or OpenAI's (temperature 0.7)."),
    ] = "model"
