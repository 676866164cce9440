"""The head "score" of sequence classification classes, for the rows that they would pool.

A class's own ``forward`` gives one score a padded row, so packed rows need the head alone. Which
rows it wants is :attr:`ModelInfo.score_rows`: causal classes score the last token, encoders the
first or the mean. transformers looks for the last token whose id isn't the padding's, which is
the one before where padding is a real token (many chat models end their turns with it). Here
the last token is the last token: requests aren't padded.
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
    """The head "score" of a model whose ``score_rows`` isn't ""."""
    return Head(NAME, build=score_head, reference=reference, rows=info.score_rows)


def score_head(model: Any) -> Apply:
    """Pooled hidden rows ``[R, hidden_size]`` -> scores ``[R, labels]``, without activation.

    The head's modules are found by the names that transformers' families give them; what a class
    does beside them shows when core compares with :func:`reference`.
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
    """The class's own scores ``[1, labels]`` for ids ``[1, T]``; the last one isn't the padding's."""
    scores: torch.Tensor = model(input_ids=input_ids).logits
    return scores


def _pooler(model: Any) -> Apply | None:
    """What a class does to the first row before its classifier; None where the classifier does it all."""
    if (own := getattr(model, "pooler", None)) is not None:  # DeBERTa keeps it beside the backbone
        return lambda rows: own(rows[:, None])
    backbone = backbone_of(model)
    below = getattr(backbone, "pooler", None)
    if below is None:
        return None
    if (activation := getattr(backbone, "pooler_activation", None)) is not None:  # ALBERT's, a module of its own
        return lambda rows: activation(below(rows))
    return lambda rows: below(rows[:, None])
