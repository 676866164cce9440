"""The head "score" of sequence classification classes, applied to the hidden rows that they pool.

The ``forward`` of such a class expects padded rows and returns one score for each, so for packed rows we
apply the head by itself. :attr:`ModelInfo.score_rows` says which hidden rows it takes: the last token of
causal classes, the first token or the mean of encoders.

For the last token, transformers takes the last id that isn't the padding id. That is wrong if a text
ends with the padding id, as in many chat models, whose end-of-turn token is also the padding token.
Requests aren't padded here, so the last token is always scored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trunkline.core.errors import ModelError
from trunkline.core.types import Head, ModelInfo

from .architecture import backbone_of

NAME = "score"
Apply = Callable[[torch.Tensor], torch.Tensor]


def head(info: ModelInfo) -> Head:
    """The head "score" of a model with ``score_rows``, which must not be ""."""
    return Head(NAME, build=score_head, reference=reference, rows=info.score_rows)


def score_head(model: Any) -> Apply:
    """Make the function from pooled hidden rows ``[R, hidden_size]`` to scores ``[R, labels]``, without activation.

    The head's modules are found by the names that transformers' model families use. Core compares the
    result with :func:`reference`, which shows if a class does anything else. ModelError for unknown names.
    """
    if isinstance(getattr(model, "score", None), torch.nn.Module):  # all decoders
        return lambda rows: model.score(rows)
    if not hasattr(model, "classifier"):
        raise ModelError(f"{type(model).__name__} has neither a module 'score' nor a module 'classifier'.")
    if isinstance(getattr(model, "head", None), torch.nn.Module):  # ModernBERT
        return lambda rows: model.classifier(model.head(rows))
    if hasattr(model, "pre_classifier"):  # DistilBERT
        return lambda rows: model.classifier(torch.relu(model.pre_classifier(rows)))
    pool = _pooler(model)
    if pool is not None:  # BERT, ALBERT, DeBERTa
        return lambda rows: model.classifier(pool(rows))
    return lambda rows: model.classifier(rows[:, None])  # RoBERTa, ELECTRA, MPNet


def reference(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """The scores ``[1, labels]`` by the class's own ``forward``, for ids ``[1, T]`` that don't end with padding."""
    scores: torch.Tensor = model(input_ids=input_ids).logits
    return scores


def _pooler(model: Any) -> Apply | None:
    """The pooler that a class applies to the first row before its ``classifier``; None if it has none."""
    if (own := getattr(model, "pooler", None)) is not None:  # DeBERTa keeps it beside the backbone
        return lambda rows: own(rows[:, None])
    backbone = backbone_of(model)
    below = getattr(backbone, "pooler", None)
    if below is None:
        return None
    if (activation := getattr(backbone, "pooler_activation", None)) is not None:  # ALBERT has it as a separate module
        return lambda rows: activation(below(rows))
    return lambda rows: below(rows[:, None])
