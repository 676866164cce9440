"""Settings of the rerank task: TOML table ``[rerank]`` and flags."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

TASK = "rerank"
GROUP = "rerank"

Format = Literal["sglang", "jina", "cohere", "tei"]
PromptStyle = Literal["auto", "judge", "pair"]


class RerankSettings(Struct, frozen=True):
    """Every field is a flag: ``rerank_format`` is ``--rerank-format``."""

    rerank_format: Annotated[
        Format,
        Meta(description="Format of /v1/rerank for clients that are not recognised; `?format=` overrides it."),
    ] = "sglang"
    rerank_instruct: Annotated[
        str | None,
        Meta(description="Instruction for causal rerankers; by default that of Qwen3-Reranker, or none."),
    ] = None
    rerank_prompt: Annotated[
        PromptStyle,
        Meta(
            description="Prompt of causal models: `judge` asks for yes or no in a chat turn, `pair` joins the texts, "
            "`auto` chooses by the checkpoint."
        ),
    ] = "auto"
