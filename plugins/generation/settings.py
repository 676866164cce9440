"""Settings of the generation task: TOML table ``[generation]`` and flags."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from trunkline.core.types import ServedModel

TASK = "generation"
GROUP = "generation"
RESERVED = 2  # tokens of the context that are never generated, as in SGLang
INPUT_RESERVE = 6  # tokens of the context that a prompt must leave free, as in SGLang


class GenerationSettings(Struct, frozen=True):
    """Settings of the generation task, for all models or per model."""

    preferred_sampling_params: Annotated[
        str | None,
        Meta(description="Sampling defaults as a JSON object, e.g. '{\"temperature\": 0}'; a request overrides them."),
    ] = None
    stream_interval: Annotated[int, Meta(ge=1, le=4096, description="Number of tokens per frame of a stream.")] = 1
    enable_return_hidden_states: Annotated[
        bool, Meta(description="Let requests ask for hidden states (return_hidden_states).")
    ] = False
    max_n: Annotated[int, Meta(ge=1, le=1024, description="Limit on n, the number of samples per prompt.")] = 64
    tool_call_parser: Annotated[
        str,
        Meta(
            description="Format of the model's tool calls: auto chooses it by the chat template, none reads no calls; "
            "hermes also explains tools to a model whose template takes none; docs/tools.md lists the names."
        ),
    ] = "auto"
    reasoning_parser: Annotated[
        str, Meta(description="Format of the model's reasoning: auto, none or a name in docs/tools.md.")
    ] = "auto"
    sampling_defaults: Annotated[
        Literal["model", "openai"],
        Meta(
            description="Sampling defaults of OpenAI's routes: the model's generation_config.json, or temperature 0.7 "
            "for chats and 1 for completions."
        ),
    ] = "model"
    grammar_backend: Annotated[
        str,
        Meta(
            description="Engine for json_schema, regex, ebnf and structural_tag: auto (llguidance), none, or the name "
            "of a plugin's."
        ),
    ] = "auto"


def input_limit(served: ServedModel) -> int:
    """The limit on tokens of a prompt, which must have fewer than this number."""
    return served.max_request_tokens - INPUT_RESERVE


def new_token_limit(prompt_len: int, max_new_tokens: int, max_request_tokens: int) -> int:
    """``max_new_tokens``, lowered to the number of tokens for which the context has space."""
    return max(0, min(max_new_tokens, max_request_tokens - RESERVED - prompt_len))
