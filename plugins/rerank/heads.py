"""Logits of answer tokens, by hand from the hidden row that predicts the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trunkline.core.types import Head


def build(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Hidden rows ``[R, hidden_size]`` after the final norm -> the class's own logits ``[R, vocab_size]``.

    Some classes multiply (Cohere), divide (Granite) or cap (Gemma 2) what the projection gives.
    """
    config = model.config.get_text_config()
    factor = float(getattr(model, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        # Asked for anew each time: the matrix may be packed after load, or replaced by an update.
        projected: torch.Tensor = model.get_output_embeddings()(hidden)
        scaled = projected if factor == 1.0 else projected * factor
        return scaled if cap is None else cap * torch.tanh(scaled / cap)

    return logits


def reference(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """The class's own logits for the token after ids ``[1, T]``: ``[1, vocab_size]``."""
    whole = model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    answer: torch.Tensor = whole.logits[:, -1]
    return answer


LABELS = Head("rerank_labels", build=build, reference=reference)
