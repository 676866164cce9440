"""Settings of the embedding task: TOML table ``[embedding]`` and flags."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

TASK = "embedding"
GROUP = "embedding"


class EmbeddingSettings(Struct, frozen=True):
    """Every field is a flag: ``embedding_truncate`` is ``--embedding-truncate``."""

    is_embedding: Annotated[
        bool, Meta(description="Serve embeddings from a causal model; by default, no other task.")
    ] = False
    pooling: Annotated[
        Literal["auto", "cls", "mean", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean"],
        Meta(description="Pooling of models without modules.json; auto: last token for decoders, else the first."),
    ] = "auto"
    matryoshka: Annotated[
        bool, Meta(description="Allow `dimensions` for models whose config doesn't declare Matryoshka training.")
    ] = False
    embedding_truncate: Annotated[
        Literal["none", "start", "end"],
        Meta(description="Default end at which texts that are too long are cut; none: they are refused."),
    ] = "none"
    embedding_ids: Annotated[
        Literal["check", "trust"],
        Meta(
            description="Token ids on /v1/embeddings: check refuses ids without the special tokens that the model's "
            "tokenizer adds (they are from another tokenizer), trust accepts all."
        ),
    ] = "check"
