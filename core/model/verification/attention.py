"""Verification at load: compares our attention with transformers' own forward pass, and refuses models that differ."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle

import numpy as np
import torch

from trunkline.core.cache.pool import KVPool, KVShape
from trunkline.core.errors import ModelError
from trunkline.core.model.architecture import layer_count
from trunkline.core.model.attention import EAGER, NAME, ForwardContext, packed_layout, paged_layout
from trunkline.core.model.packed import PackedModel
from trunkline.core.model.refusal import BYPASSED, failed_pass

from .samples import Sample, samples
from .strict import strict

log = logging.getLogger("trunkline.model")

SPLIT = (5, 11)  # tokens of the first of two passes, in turn for the warm-up sequences
TOLERANCE = {torch.float32: 1e-3}  # relative error over all layers; wrong masks give 0.1 and more
LOW_PRECISION = 0.1  # for dtypes not named above


def verify_attention(model: PackedModel) -> tuple[PackedModel, list[KVShape]]:
    """Run :func:`compare` in float32 with short windows, then, for other dtypes, once more as the model is served."""
    with strict(model) as wide:
        compared, shapes = compare(wide)
    model = replace(model, padded=compared.padded)
    return (model, shapes) if model.dtype == torch.float32 else compare(model)


def verify_cache(model: PackedModel, shapes: list[KVShape], kv_dtype: torch.dtype) -> None:
    """ModelError if hidden rows over a KV pool of ``kv_dtype`` differ too much from those over a pool of the model's.

    The bound is that of low precision: rounding to int8 gives errors of 1 to 2%, but heads in which few numbers of
    the keys are much larger than the others lose those.
    """
    sequences = samples(model)
    plain, stored = (_in_two_passes(model, sequences, shapes, dtype) for dtype in (model.dtype, kv_dtype))
    error = _difference(stored, plain, kv_dtype)
    name = str(kv_dtype).removeprefix("torch.")
    log.info("%s: the KV cache in %s changes hidden rows by %.1e", model.info.architecture, name, error)
    if not error <= LOW_PRECISION:
        raise ModelError(
            f"{model.info.architecture} can't be served with --kv-cache-dtype {name}: its warm-up differs by "
            f"{error:.1e} (relative) from that with a plain KV cache. Leave the option out."
        )


def compare(model: PackedModel) -> tuple[PackedModel, list[KVShape]]:
    """Compare our attention with transformers' eager attention; returns the model, and each layer's key and value
    shapes.

    Several sequences are packed. Causal models compute them in two passes, over a KV pool with scattered slots.
    The results must equal those of each sequence alone in eager attention. If the packed results of an encoder
    differ, the model that is returned runs padded batches; these are compared, too. Encoders keep no keys and values,
    so the list is empty for them. ModelError if the model bypasses our function, keeps state elsewhere, or differs.
    """
    sequences = samples(model)
    shapes: list[KVShape] = []
    try:
        alone = _eager(model, sequences)
        if model.info.causal:
            shapes = _shapes(model, sequences)
            ours = _in_two_passes(model, sequences, shapes, model.dtype)
        else:
            model, ours = _encoded(model, sequences, alone)
    except ModelError:
        raise
    except Exception as error:  # foreign code, with arguments that it may not expect
        raise ModelError(f"{model.info.architecture} can't be served: {_failure(model, error)}") from error
    difference = _difference(ours, alone, model.dtype)
    if not difference <= _tolerance(model):
        raise ModelError(
            f"{model.info.architecture} can't be served: {'padded' if model.padded else 'packed and paged'}, its "
            f"warm-up differs from transformers' own forward by {difference:.1e} (relative), so there is more to it "
            "than tokens, positions from 0 on and what it passes to attention."
        )
    return model, shapes


def _failure(model: PackedModel, error: Exception) -> str:
    """The reason for refusing a model whose warm-up pass raised an exception."""
    if model.info.causal and not model.whole._supports_attention_backend:
        return BYPASSED
    advice = "" if model.dtype == torch.float32 else " --dtype float32 may work."
    return failed_pass(error, padded=model.padded) + advice


def shapes_of(context: ForwardContext, layers: int, architecture: str) -> list[KVShape]:
    """Each layer's key and value shape after a pass. ModelError unless each layer called attention exactly once."""
    if context.calls == 0:
        raise ModelError(f"{architecture} can't be served: {BYPASSED}")
    if context.calls != layers or sorted(context.kv_shapes) != list(range(layers)):
        raise ModelError(
            f"{architecture} can't be served: it calls attention {context.calls} times in a pass through {layers} "
            "layers. Layers must call it once each and keep no state of another kind."
        )
    return [context.kv_shapes[layer] for layer in range(layers)]


def _encoded(
    model: PackedModel, sequences: Sequence[Sample], alone: Sequence[torch.Tensor]
) -> tuple[PackedModel, list[torch.Tensor]]:
    """The model and each sequence's hidden rows from one pass; if packed rows differ from ``alone``, a padded one."""
    counts = [len(sample.ids) for sample in sequences]
    types = _types(model, counts)
    context = ForwardContext(packed_layout(counts), None, model.backend)
    ids, positions, lengths = _inputs(model, sequences, [(0, count) for count in counts])
    if not model.padded:
        try:
            ours = list(torch.split(model.run(ids, positions, context, types, lengths), counts))
            if context.calls and _difference(ours, alone, model.dtype) <= _tolerance(model):
                return model, ours
            reason = "packed rows differ from single ones" if context.calls else "its attention doesn't call ours"
        except (ValueError, RuntimeError, TypeError) as error:
            reason = str(error)
        log.warning("%s runs in padded batches: %s", model.info.architecture, reason)
        model = replace(model, padded=True)
        model.whole.set_attn_implementation(model.attention)
    return model, list(torch.split(model.run(ids, positions, context, types, lengths), counts))


def _inputs(
    model: PackedModel, sequences: Sequence[Sample], spans: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed ids, positions and sequence lengths of the tokens ``[begin, end)`` of each sequence, int64 ``[T]``."""
    pairs = list(zip(sequences, spans, strict=True))
    ids = torch.cat([sample.ids[begin:end] for sample, (begin, end) in pairs])
    positions = torch.cat([sample.positions(begin, end) for sample, (begin, end) in pairs])
    lengths = torch.cat([torch.full((end - begin,), sample.length) for sample, (begin, end) in pairs])
    return ids, positions.to(model.device), lengths.to(model.device)


def _types(model: PackedModel, lengths: Sequence[int]) -> torch.Tensor | None:
    """Token types, int64 ``[T]``, as if each sequence's second half were the second text. None without token types."""
    if not model.token_types:
        return None
    return torch.cat([torch.arange(length) >= length // 2 for length in lengths]).long().to(model.device)


def _shapes(model: PackedModel, sequences: Sequence[Sample]) -> list[KVShape]:
    """Each layer's key and value shape, from one pass without a pool."""
    counts = [len(sample.ids) for sample in sequences]
    context = ForwardContext(packed_layout(counts), None, model.backend)
    ids, positions, lengths = _inputs(model, sequences, [(0, count) for count in counts])
    model.run(ids, positions, context, lengths=lengths)
    return shapes_of(context, layer_count(model.whole.config), model.info.architecture)


def _in_two_passes(
    model: PackedModel, sequences: Sequence[Sample], shapes: list[KVShape], kv_dtype: torch.dtype
) -> list[torch.Tensor]:
    """Each sequence's hidden rows, computed in two passes over a KV pool."""
    counts = [len(sample.ids) for sample in sequences]
    total = sum(counts)
    pool = KVPool(shapes, total, kv_dtype, model.device)
    table = np.zeros((len(sequences), max(counts)), np.int32)
    # Descending, so that the order in the pool differs from that in the row.
    slots = np.arange(total, dtype=np.int32)[::-1]
    for row, count in enumerate(counts):
        table[row, :count], slots = slots[:count], slots[count:]
    cuts = [min(cut, count - 1) for cut, count in zip(cycle(SPLIT), counts, strict=False)]
    passes = ([(0, cut) for cut in cuts], list(zip(cuts, counts, strict=True)))
    pieces: list[list[torch.Tensor]] = [[] for _ in sequences]
    for spans in passes:
        ids, positions, lengths = _inputs(model, sequences, spans)
        layout = paged_layout(table, spans, model.device)
        hidden = model.forward(ids, positions, layout, pool, lengths=lengths)
        for piece, rows in zip(pieces, torch.split(hidden, [end - start for start, end in spans]), strict=True):
            piece.append(rows)
    return [torch.cat(piece) for piece in pieces]


def _eager(model: PackedModel, sequences: Sequence[Sample]) -> list[torch.Tensor]:
    """Each sequence's hidden rows, computed alone with transformers' eager attention and experts."""
    whole, backbone = model.whole, model.backbone
    routed = whole._can_set_experts_implementation()
    whole.set_attn_implementation(EAGER)
    if routed:
        whole.set_experts_implementation("eager")
    try:
        with torch.inference_mode():
            return [
                backbone(
                    input_ids=sample.ids[None], **_placed(model, sample), **_typed(model, sample.ids), **model.cacheless
                ).last_hidden_state[0]
                for sample in sequences
            ]
    finally:
        whole.set_attn_implementation(model.attention)
        if routed:
            whole.set_experts_implementation(NAME)


def _placed(model: PackedModel, sample: Sample) -> dict[str, torch.Tensor]:
    """Position ids for the class's own forward. None for sequences from position 0 on.

    That positions start at 0 by default is part of what is verified.
    """
    if not sample.start:
        return {}
    return {"position_ids": (sample.positions() + model.position_offset)[None].to(model.device)}


def _typed(model: PackedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    types = None if model.info.causal else _types(model, [len(ids)])
    return {} if types is None else {"token_type_ids": types[None]}


def _tolerance(model: PackedModel) -> float:
    return TOLERANCE.get(model.dtype, LOW_PRECISION)


def _difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], dtype: torch.dtype) -> float:
    """The largest relative error of a sequence; NaN counts as the largest."""
    errors = [_per_token_error(mine, other, dtype) for mine, other in zip(ours, theirs, strict=True)]
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _per_token_error(mine: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest relative error of a token in float32, the median in other dtypes.

    There, rounding may route single tokens to other experts.
    """
    mine, theirs = mine.float(), theirs.float()
    errors = (mine - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-12)
    return float(errors.max() if dtype == torch.float32 else errors.median())
