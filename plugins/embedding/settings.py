"""Settings of the embedding task: TOML table ``[embedding]`` and flags."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

TASK = "embedding"
GROUP = "embedding"


class EmbeddingSettings(Struct, frozen=True):
    """Every field is a flag: ``embedding_truncate`` is ``--embedding-truncate``."""

    is_embedding: Annotated[
        bool, Meta(description="Serve vectors from a causal model, and nothing else by default.")
    ] = False
    pooling: Annotated[
        Literal["auto", "cls", "mean", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"],
        Meta(description="Pooling of models without modules.json; auto: last token if causal, else the first."),
    ] = "auto"
    matryoshka: Annotated[
        bool, Meta(description="Allow `dimensions` for models whose config doesn't say that they were trained for it.")
    ] = False
    embedding_truncate: Annotated[
        Literal["none", "start", "end"],
        Meta(description="Where too long texts are cut when the request doesn't say; none refuses them."),
    ] = "none"
    embedding_ids: Annotated[
        Literal["check", "trust"],
        Meta(
            description="Token ids on /v1/embeddings: check refuses those without the special tokens that the model's "
            "tokenizer adds (they come from another tokenizer), trust takes all."
        ),
    ] = "check"
