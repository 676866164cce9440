"""The head "lm": logits of hidden rows.

Every causal checkpoint with an output matrix has it, whatever tasks are served. So no plugin has to
know what a class does between its last hidden state and its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch

from trunkline.core.errors import ModelError
from trunkline.core.types import Head

from .architecture import output_matrix

CLASSES = ("ForCausalLM", "LMHeadModel")  # suffixes of the names of classes with this head


def build(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make the function from hidden rows ``[R, hidden_size]``, after the final norm, to logits ``[R, vocab_size]``.

    Some models do more in ``forward`` than call the head: Cohere multiplies the logits, Granite divides
    them, Gemma 2 applies a softcap. Core compares the result with :func:`reference`, and refuses models
    that do anything else.
    """
    project = attrgetter(_head_path(model))  # looked up at each call: fusion replaces the module after load
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
    """The logits of the last position ``[1, vocab_size]`` by the class's own ``forward``, for ids ``[1, T]``."""
    # Not logits_to_keep=1: with it, models whose last layers share keys compute these layers for one token only.
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


# Not in float32: on CPUs with bfloat16 instructions, the product with the output matrix would take 14 times as long.
HEAD = Head("lm", build=build, reference=reference, float32=False)
