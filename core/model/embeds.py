"""Whether a model's prompts can be embeddings in place of token ids."""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

import numpy as np
import torch

from trunkline.core.errors import RequestError

from .attention import ForwardContext, packed_layout
from .loaded import LoadedModel
from .refusal import reason_of
from .verification.samples import WARM_UP, warm_up_ids

log = logging.getLogger("trunkline.model")

TOLERANCE = {torch.float32: 1e-4}  # relative error of the hidden rows; both passes run the same kernels
LOW_PRECISION = 0.05  # for dtypes not named above

_reasons: WeakKeyDictionary[LoadedModel, str] = WeakKeyDictionary()  # why not, "" where it was verified


def check_embeds(model: LoadedModel, embeds: np.ndarray) -> None:
    """RequestError unless the model takes float32 embeddings ``[T, width]``.

    The first call of a model verifies that the embeddings of ids give the hidden rows that the ids give.
    Models that also look ids up elsewhere (per-layer embeddings) fail this.
    """
    reason = _reasons.get(model)
    if reason is None:
        reason = _reasons[model] = _difference(model)
        log.info("%s %s", model.name, f"takes no input_embeds: {reason}" if reason else "takes input_embeds")
    if reason:
        raise RequestError(f"{model.name} can't take input_embeds: {reason}", param="input_embeds")
    width = _width(model)
    if embeds.shape[1] != width:
        raise RequestError(
            f"input_embeds have {embeds.shape[1]} components each; embeddings of {model.name} have {width}.",
            param="input_embeds",
        )


def _width(model: LoadedModel) -> int:
    """Components of one of the model's embeddings; mostly its hidden size."""
    return int(_look_up(model, torch.zeros(1, dtype=torch.int64, device=model.device)).shape[-1])


@torch.inference_mode()
def _look_up(model: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    vectors: torch.Tensor = model.backbone.get_input_embeddings()(ids)
    return vectors


def _difference(model: LoadedModel) -> str:
    """Compares hidden rows of ids with those of their embeddings. "", or why the model can't take embeddings."""
    if model.padded or not model.info.causal:
        return "it isn't a causal model."
    ids = warm_up_ids(model, max(2, min(WARM_UP[1], model.info.context_length)))
    positions = torch.arange(len(ids), device=model.device)
    try:
        mine, theirs = (
            model.run(ids if embeds is None else torch.zeros_like(ids), positions, context, embeds=embeds).float()
            for embeds, context in (
                (
                    (positions, _look_up(model, ids).float()),
                    ForwardContext(packed_layout([len(ids)]), None, model.backend),
                ),
                (None, ForwardContext(packed_layout([len(ids)]), None, model.backend)),
            )
        )
    except Exception as error:  # foreign code, with arguments that it may not expect
        return f"its forward doesn't run on them (it raised {reason_of(error)})."
    error_of = (mine - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-12)
    worst = float(error_of.max())
    if not worst <= TOLERANCE.get(model.dtype, LOW_PRECISION):
        return f"it uses token ids elsewhere, too (its hidden rows differ by {worst:.1e}, relative)."
    return ""
