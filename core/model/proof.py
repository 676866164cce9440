"""Every shortcut proves itself at load, on a warm-up sequence, against transformers' own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..cache.pool import KVPool, KVShape
from ..errors import ModelError
from ..types import Head
from .architecture import layer_count
from .attention import NAME, ForwardContext, packed_layout, paged_layout, positions
from .loaded import LoadedModel

if TYPE_CHECKING:
    from trunkline.kernels.layout import Layout

WARM_UP = (6, 19)  # tokens of the two warm-up sequences; the first ends in a decode step
SPLIT = (5, 11)  # where their first pass ends
HEAD_TOLERANCE = {torch.float32: 1e-4}  # relative; a head is one product and a few scalars
HIDDEN_TOLERANCE = {torch.float32: 1e-3}  # relative, over all layers; wrong masks give 0.1 and more
LOW_PRECISION = 0.1  # for dtypes not named above


def warm_up_ids(vocab_size: int, count: int) -> torch.Tensor:
    """int64 ``[count]``: arbitrary ids, the same on every run."""
    return (torch.arange(count) * 7919 + 11) % vocab_size


def prove_attention(model: LoadedModel) -> list[KVShape]:
    """Our attention against transformers' eager one; returns each layer's key and value shapes.

    Two sequences packed in one row, causal ones in two passes over a paged pool with scattered
    slots, must give what each gives alone. ModelError when the model bypasses our function, keeps
    state elsewhere or differs.
    """
    lengths = [max(2, min(length, model.info.context_length)) for length in WARM_UP]
    sequences = torch.split(warm_up_ids(model.info.vocab_size, sum(lengths)).to(model.device), lengths)
    try:
        alone = _eager(model, sequences)
        packed, shapes = _packed(model, sequences)
    except ModelError:
        raise
    except Exception as error:  # whatever the class does with what it isn't used to
        raise ModelError(f"{model.info.architecture} can't be served: its warm-up fails with: {error}") from error
    ours = _in_two_passes(model, sequences, shapes) if model.info.causal else packed
    for mine, theirs in zip(ours, alone, strict=True):
        difference = _per_token_error(mine, theirs, model.dtype)
        if not difference <= HIDDEN_TOLERANCE.get(model.dtype, LOW_PRECISION):
            raise ModelError(
                f"{model.info.architecture} can't be served: packed and paged, its warm-up differs from transformers' "
                f"own forward by {difference:.1e} (relative), so there is more to it than tokens, positions from 0 on "
                "and what it passes to attention."
            )
    return shapes


def prove_head(model: LoadedModel, head: Head) -> str:
    """Build a head into ``model.heads``; the sentence against it when it isn't what the class computes."""
    name, architecture = head.name, model.info.architecture
    ids = warm_up_ids(model.info.vocab_size, min(WARM_UP[1], model.info.context_length)).to(model.device)
    layout, places = packed_layout([len(ids)]), torch.arange(len(ids), device=model.device)
    try:
        apply = head.build(model.whole)
        if head.reference is not None:
            hidden = model.forward(ids, places, layout, None)
            with torch.inference_mode(), _as_class_does(model, layout, places):
                error = _relative(apply(hidden[-1:]), head.reference(model.whole, ids[None]))
            if not error <= HEAD_TOLERANCE.get(model.dtype, LOW_PRECISION):
                return f"The head {name!r} differs from {architecture}'s own forward by {error:.1e} (relative)."
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        return f"The head {name!r} doesn't fit {architecture}: {error}"
    model.heads = {**model.heads, name: apply}
    return ""


def shapes_of(context: ForwardContext, layers: int, architecture: str) -> list[KVShape]:
    """Shapes by layer after a pass; ModelError unless each layer called attention exactly once."""
    if context.calls == 0:
        raise ModelError(
            f"{architecture} can't be served: transformers doesn't route its attention through a registered "
            "function, so requests can't be packed into one batch."
        )
    if context.calls != layers or sorted(context.seen) != list(range(layers)):
        raise ModelError(
            f"{architecture} can't be served: it calls attention {context.calls} times in a pass through {layers} "
            "layers. Layers must call it once each and keep no state of another kind."
        )
    return [context.seen[layer] for layer in range(layers)]


def _packed(model: LoadedModel, sequences: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[KVShape]]:
    """Each sequence's hidden rows from one pass without a pool, and what each layer handed to attention."""
    lengths = [len(ids) for ids in sequences]
    context = ForwardContext(packed_layout(lengths), None, model.backend)
    places = positions([(0, length) for length in lengths]).to(model.device)
    hidden = model.run(torch.cat(list(sequences)), places, context)
    shapes = shapes_of(context, layer_count(model.whole.config), model.info.architecture)
    return list(torch.split(hidden, lengths)), shapes


def _in_two_passes(model: LoadedModel, sequences: Sequence[torch.Tensor], shapes: list[KVShape]) -> list[torch.Tensor]:
    """Each sequence's hidden rows, computed in two passes over a pool."""
    total = sum(len(ids) for ids in sequences)
    pool = KVPool(shapes, total, model.dtype, model.device)
    table = np.zeros((len(sequences), max(len(ids) for ids in sequences)), np.int32)
    slots = np.arange(total, dtype=np.int32)[::-1]  # backwards: neighbours in a row aren't neighbours in the pool
    for row, ids in enumerate(sequences):
        table[row, : len(ids)], slots = slots[: len(ids)], slots[len(ids) :]
    cuts = [min(cut, len(ids) - 1) for cut, ids in zip(SPLIT, sequences, strict=True)]
    passes = ([(0, cut) for cut in cuts], [(cut, len(ids)) for cut, ids in zip(cuts, sequences, strict=True)])
    pieces: list[list[torch.Tensor]] = [[] for _ in sequences]
    for spans in passes:
        ids = torch.cat([ids[start:end] for ids, (start, end) in zip(sequences, spans, strict=True)])
        hidden = model.forward(ids, positions(spans).to(model.device), paged_layout(table, spans, model.device), pool)
        for piece, rows in zip(pieces, torch.split(hidden, [end - start for start, end in spans]), strict=True):
            piece.append(rows)
    return [torch.cat(piece) for piece in pieces]


def _eager(model: LoadedModel, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each sequence alone through transformers' own attention and experts."""
    whole, backbone = model.whole, model.backbone
    routed = whole._can_set_experts_implementation()
    whole.set_attn_implementation("eager")
    if routed:
        whole.set_experts_implementation("eager")
    try:
        with torch.inference_mode():
            # No position ids: where a sequence begins is part of what is being proven.
            return [backbone(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in sequences]
    finally:
        whole.set_attn_implementation(NAME)
        if routed:
            whole.set_experts_implementation(NAME)


@contextmanager
def _as_class_does(model: LoadedModel, layout: Layout, places: torch.Tensor) -> Iterator[None]:
    """Lets the class's own ``forward`` run with our attention: it gets what ours needs as defaults."""

    def complete(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        context = ForwardContext(layout, None, model.backend)
        return args, {"position_ids": places[None], "use_cache": False, "trunk": context, **given}

    hook: Callable[..., Any] = model.whole.register_forward_pre_hook
    handle = hook(complete, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _relative(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    mine, theirs = mine.float().reshape(-1), theirs.float().reshape(-1)
    return float((mine - theirs).norm() / theirs.norm().clamp_min(1e-12))


def _per_token_error(mine: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> float:
    """The worst token's relative error; the median one's where rounding may send a token to another expert."""
    mine, theirs = mine.float(), theirs.float()
    errors = (mine - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp_min(1e-12)
    return float(errors.max() if dtype == torch.float32 else errors.median())
