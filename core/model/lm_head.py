"""The head "lm": logits for the hidden rows that need them.

Every causal checkpoint with an output matrix has it, whatever tasks are served, so that no plugin
has to know what a class does between its last hidden state and its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch

from trunkline.core.errors import ModelError
from trunkline.core.types import Head

from .architecture import output_matrix

CLASSES = ("ForCausalLM", "LMHeadModel")  # how the names of classes with this head end


def build(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Hidden rows ``[R, hidden_size]`` after the final norm -> logits ``[R, vocab_size]``.

    Some models do more in ``forward`` than call the head: Cohere multiplies, Granite divides,
    Gemma 2 caps. Core compares with :func:`reference` and refuses what isn't covered here.
    """
    project = attrgetter(_head_path(model))  # looked up at each call: the linear may be repacked after load
    config = model.config.get_text_config()
    scale = _scale(model, config)
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = project(model)(hidden)
        if scale != 1.0:
            out = out * scale
        if cap is not None:
            out = torch.tanh(out / cap) * cap
        return out

    return logits


def reference(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """The class's own logits of the last position, ``[1, vocab_size]``, for ids ``[1, T]``."""
    # Not logits_to_keep=1: models whose last layers share keys would compute these layers for one token only.
    last: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits[:, -1]
    return last


def _head_path(model: Any) -> str:
    head = output_matrix(model)
    for name, module in model.named_modules():
        if head is not None and module is head:
            return str(name)
    raise ModelError(f"{type(model).__name__} has no output projection, so it has no logits.")


def _scale(model: Any, config: Any) -> float:
    """The one factor between the projection and the logits; 1.0 for most models."""
    if (multiplied := getattr(model, "logit_scale", None)) is not None:
        return float(multiplied)
    if (divided := getattr(config, "logits_scaling", None)) is not None:
        return 1.0 / float(divided)
    return 1.0


# A product with the whole vocabulary in float32 takes 14 times as long on CPUs that compute in bfloat16.
HEAD = Head("lm", build=build, reference=reference, float32=False)
