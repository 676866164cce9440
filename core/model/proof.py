"""Verification at load: compares attention and heads with transformers' own forward pass, and refuses what differs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trunkline.core.cache.pool import KVPool, KVShape
from trunkline.core.errors import ModelError
from trunkline.core.types import Head

from .architecture import layer_count
from .attention import EAGER, NAME, ForwardContext, packed_layout, paged_layout
from .loaded import LoadedModel
from .refusal import BYPASSED, failed_pass
from .samples import WARM_UP, Sample, samples, warm_up_ids
from .strict import in_float32, strict

if TYPE_CHECKING:
    from trunkline.kernels.layout import Layout

log = logging.getLogger("trunkline.model")

SPLIT = (5, 11)  # tokens of the first of two passes, in turn for the warm-up sequences
HEAD_TOLERANCE = {torch.float32: 1e-4}  # relative error; a head is one product and a few scalars
HIDDEN_TOLERANCE = {torch.float32: 1e-3}  # relative error over all layers; wrong masks give 0.1 and more
LOW_PRECISION = 0.1  # for dtypes not named above


def verify_attention(model: LoadedModel) -> list[KVShape]:
    """Run :func:`compare` in float32 with short windows, then, for other dtypes, once more as the model is served."""
    with strict(model):
        shapes = compare(model)
    return shapes if model.dtype == torch.float32 else compare(model)


def compare(model: LoadedModel) -> list[KVShape]:
    """Compare our attention with transformers' eager attention; returns each layer's key and value shapes.

    Several sequences are packed. Causal models compute them in two passes, over a KV pool with scattered slots.
    The results must equal those of each sequence alone in eager attention. An encoder whose packed results
    differ is switched to padded batches, which are compared, too. Encoders keep no keys and values, so the
    list is empty for them. ModelError if the model bypasses our function, keeps state elsewhere, or differs.
    """
    sequences = samples(model)
    shapes: list[KVShape] = []
    try:
        alone = _eager(model, sequences)
        if model.info.causal:
            shapes = _shapes(model, sequences)
            ours = _in_two_passes(model, sequences, shapes)
        else:
            ours = _encoded(model, sequences, alone)
    except ModelError:
        raise
    except Exception as error:  # foreign code, with arguments that it may not expect
        raise ModelError(f"{model.info.architecture} can't be served: {_failure(model, error)}") from error
    difference = _difference(model, ours, alone)
    if not difference <= _tolerance(model):
        raise ModelError(
            f"{model.info.architecture} can't be served: {'padded' if model.padded else 'packed and paged'}, its "
            f"warm-up differs from transformers' own forward by {difference:.1e} (relative), so there is more to it "
            "than tokens, positions from 0 on and what it passes to attention."
        )
    return shapes


def _failure(model: LoadedModel, error: Exception) -> str:
    """The reason for refusing a model whose warm-up pass raised an exception."""
    if model.info.causal and not model.whole._supports_attention_backend:
        return BYPASSED
    advice = "" if model.dtype == torch.float32 else " --dtype float32 may work."
    return failed_pass(error, padded=model.padded) + advice


def verify_head(model: LoadedModel, head: Head, view: Any) -> str:
    """Build a head and add it to ``model.heads``, if its result equals that of the class's own ``forward``.

    Returns "", or the reason why the head wasn't added. ``view``: the model with float32 modules beside
    its backbone, for heads that compute in float32.
    """
    name, architecture = head.name, model.info.architecture
    ids = warm_up_ids(model, min(WARM_UP[1], model.info.context_length))
    layout, positions = packed_layout([len(ids)]), torch.arange(len(ids), device=model.device)
    try:
        apply = _in_float32(head.build(view)) if head.float32 else head.build(model.whole)
        if head.reference is not None:
            hidden = model.forward(ids, positions, layout, None)
            with torch.inference_mode(), _as_class_does(model, layout, positions):
                mine, theirs = apply(_pooled(hidden, head.rows)), head.reference(model.whole, ids[None])
                error = _relative(mine, theirs, usual=apply(hidden))
            if not error <= HEAD_TOLERANCE.get(model.dtype, LOW_PRECISION):
                return f"The head {name!r} differs from {architecture}'s own forward by {error:.1e} (relative)."
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, ModelError) as error:
        return f"The head {name!r} doesn't fit {architecture}: {error}"
    model.heads = {**model.heads, name: apply}
    return ""


def wrong_heads(model: LoadedModel, heads: Iterable[Head]) -> dict[str, str]:
    """Verify heads in float32, if the model has another dtype; returns name -> reason of those that differ.

    In the model's dtype, rounding would hide a small factor or a softcap.
    """
    if model.dtype == torch.float32:
        return {}
    with in_float32(model):
        reasons = {head.name: verify_head(model, head, model.whole) for head in heads}
    model.heads = {}
    return {name: reason for name, reason in reasons.items() if reason}


def _in_float32(apply: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda rows: apply(rows.float())


def _pooled(hidden: torch.Tensor, rows: str) -> torch.Tensor:
    """Pool ``[T, hidden_size]`` to the row ``[1, hidden_size]`` that a head takes. ValueError for an unknown name."""
    if rows == "mean":
        return hidden.mean(0, keepdim=True)
    if rows not in ("first", "last"):
        raise ValueError(f"Head.rows is {rows!r}, not 'first', 'last' or 'mean'")
    return hidden[:1] if rows == "first" else hidden[-1:]


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


def _encoded(model: LoadedModel, sequences: Sequence[Sample], alone: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each sequence's hidden rows from one pass. Sets ``model.padded`` if packed rows differ from ``alone``."""
    counts = [len(sample.ids) for sample in sequences]
    types = _types(model, counts)
    context = ForwardContext(packed_layout(counts), None, model.backend)
    ids, positions, lengths = _inputs(model, sequences, [(0, count) for count in counts])
    if not model.padded:
        try:
            ours = list(torch.split(model.run(ids, positions, context, types, lengths), counts))
            if context.calls and _difference(model, ours, alone) <= _tolerance(model):
                return ours
            reason = "packed rows differ from single ones" if context.calls else "its attention doesn't call ours"
        except (ValueError, RuntimeError, TypeError) as error:
            reason = str(error)
        log.warning("%s runs in padded batches: %s", model.info.architecture, reason)
        model.padded = True
        model.whole.set_attn_implementation(model.attention)
    return list(torch.split(model.run(ids, positions, context, types, lengths), counts))


def _inputs(
    model: LoadedModel, sequences: Sequence[Sample], spans: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed ids, positions and sequence lengths of the tokens ``[begin, end)`` of each sequence, int64 ``[T]``."""
    pairs = list(zip(sequences, spans, strict=True))
    ids = torch.cat([sample.ids[begin:end] for sample, (begin, end) in pairs])
    positions = torch.cat([sample.positions(begin, end) for sample, (begin, end) in pairs])
    lengths = torch.cat([torch.full((end - begin,), sample.length) for sample, (begin, end) in pairs])
    return ids, positions.to(model.device), lengths.to(model.device)


def _types(model: LoadedModel, lengths: Sequence[int]) -> torch.Tensor | None:
    """Token types, int64 ``[T]``, as if each sequence's second half were the second text. None without token types."""
    if not model.token_types:
        return None
    return torch.cat([torch.arange(length) >= length // 2 for length in lengths]).long().to(model.device)


def _shapes(model: LoadedModel, sequences: Sequence[Sample]) -> list[KVShape]:
    """Each layer's key and value shape, from one pass without a pool."""
    counts = [len(sample.ids) for sample in sequences]
    context = ForwardContext(packed_layout(counts), None, model.backend)
    ids, positions, lengths = _inputs(model, sequences, [(0, count) for count in counts])
    model.run(ids, positions, context, lengths=lengths)
    return shapes_of(context, layer_count(model.whole.config), model.info.architecture)


def _in_two_passes(model: LoadedModel, sequences: Sequence[Sample], shapes: list[KVShape]) -> list[torch.Tensor]:
    """Each sequence's hidden rows, computed in two passes over a KV pool."""
    counts = [len(sample.ids) for sample in sequences]
    total = sum(counts)
    pool = KVPool(shapes, total, model.dtype, model.device)
    table = np.zeros((len(sequences), max(counts)), np.int32)
    # Descending, so that the order in the pool differs from that in the row:
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


def _eager(model: LoadedModel, sequences: Sequence[Sample]) -> list[torch.Tensor]:
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


def _placed(model: LoadedModel, sample: Sample) -> dict[str, torch.Tensor]:
    """Position ids for the class's own forward. None for sequences from position 0 on.

    That positions start at 0 by default is part of what is verified.
    """
    if not sample.start:
        return {}
    return {"position_ids": (sample.positions() + model.position_offset)[None].to(model.device)}


def _typed(model: LoadedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    types = None if model.info.causal else _types(model, [len(ids)])
    return {} if types is None else {"token_type_ids": types[None]}


@contextmanager
def _as_class_does(model: LoadedModel, layout: Layout, positions: torch.Tensor) -> Iterator[None]:
    """Inside, the class's own ``forward`` runs with our attention: a hook adds the arguments that ours needs."""

    def complete(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = {key: values[None] for key, values in model.keywords(positions, None).items()}
        ours = {} if model.padded else {"trunk": ForwardContext(layout, None, model.backend)}
        return args, {**rows, **model.cacheless, **ours, **given}

    hook: Callable[..., Any] = model.whole.register_forward_pre_hook
    handle = hook(complete, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _relative(mine: torch.Tensor, theirs: torch.Tensor, usual: torch.Tensor) -> float:
    """The relative error of ``mine``. ValueError for different shapes.

    It is relative to the norm of ``theirs``, or to the median norm of the rows ``usual`` ``[R, ...]`` if that
    is larger, since a single score may be near 0.
    """
    if mine.shape != theirs.shape:
        raise ValueError(f"it gives {list(mine.shape)}, the class {list(theirs.shape)}")
    size = max(float(theirs.float().norm()), float(usual.float().flatten(1).norm(dim=1).median()), 1e-12)
    return float((mine.float() - theirs.float()).norm()) / size


def _tolerance(model: LoadedModel) -> float:
    return HIDDEN_TOLERANCE.get(model.dtype, LOW_PRECISION)


def _difference(model: LoadedModel, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest relative error of a sequence; NaN counts as the largest."""
    errors = [_per_token_error(mine, other, model.dtype) for mine, other in zip(ours, theirs, strict=True)]
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _per_token_error(mine: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest relative error of a token in float32, the median in other dtypes.

    There, rounding may route single tokens to other experts.
    """
    mine, theirs = mine.float(), theirs.float()
    errors = (mine - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-12)
    return float(errors.max() if dtype == torch.float32 else errors.median())
