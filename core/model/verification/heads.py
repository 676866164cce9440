"""Verification at load: compares heads with transformers' own forward pass, and refuses those that differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from trunkline.core.errors import ModelError
from trunkline.core.model.attention import ForwardContext, packed_layout
from trunkline.core.model.packed import PackedModel
from trunkline.core.types import Head

from .samples import WARM_UP, warm_up_ids
from .strict import in_float32

if TYPE_CHECKING:
    from trunkline.kernels.layout import Layout

HeadFunction = Callable[[torch.Tensor], torch.Tensor]

TOLERANCE = {torch.float32: 1e-4}  # relative error; a head is one product and a few scalars
LOW_PRECISION = 0.1  # for dtypes not named above


def verify_heads(
    model: PackedModel, heads: Iterable[Head], view: Any, wrong: Mapping[str, str]
) -> tuple[dict[str, HeadFunction], dict[str, str]]:
    """Build the heads: the functions of those that are right, and the reasons why the others aren't, by name.

    ``view``: the model with float32 modules beside its backbone, for heads that compute in float32. ``wrong``: the
    result of :func:`wrong_heads`.
    """
    functions: dict[str, HeadFunction] = {}
    reasons: dict[str, str] = {}
    for head in heads:
        try:
            if head.name in wrong:
                raise ModelError(wrong[head.name])
            functions[head.name] = verify_head(model, head, view)
        except ModelError as error:
            reasons[head.name] = str(error)
    return functions, reasons


def wrong_heads(model: PackedModel, heads: Iterable[Head]) -> dict[str, str]:
    """Verify heads in float32, if the model has another dtype; returns name -> reason of those that differ.

    In the model's dtype, rounding would hide a small factor or a softcap.
    """
    if model.dtype == torch.float32:
        return {}
    with in_float32(model) as wide:
        return verify_heads(wide, heads, wide.whole, {})[1]


def verify_head(model: PackedModel, head: Head, view: Any) -> HeadFunction:
    """Build a head. ModelError unless its result equals that of the class's own ``forward``."""
    name, architecture = head.name, model.info.architecture
    ids = warm_up_ids(model, min(WARM_UP[1], model.info.context_length))
    layout, positions = packed_layout([len(ids)]), torch.arange(len(ids), device=model.device)
    error = 0.0
    try:
        apply = _in_float32(head.build(view)) if head.float32 else head.build(model.whole)
        if head.reference is not None:
            hidden = model.forward(ids, positions, layout, None)
            with torch.inference_mode(), _as_class_does(model, layout, positions):
                mine, theirs = apply(_pooled(hidden, head.rows)), head.reference(model.whole, ids[None])
                error = _relative(mine, theirs, usual=apply(hidden))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, ModelError) as failure:
        raise ModelError(f"The head {name!r} doesn't fit {architecture}: {failure}") from failure
    if not error <= TOLERANCE.get(model.dtype, LOW_PRECISION):
        raise ModelError(f"The head {name!r} differs from {architecture}'s own forward by {error:.1e} (relative).")
    return apply


def _in_float32(apply: HeadFunction) -> HeadFunction:
    return lambda rows: apply(rows.float())


def _pooled(hidden: torch.Tensor, rows: str) -> torch.Tensor:
    """Pool ``[T, hidden_size]`` to the row ``[1, hidden_size]`` that a head takes. ValueError for an unknown name."""
    if rows == "mean":
        return hidden.mean(0, keepdim=True)
    if rows not in ("first", "last"):
        raise ValueError(f"Head.rows is {rows!r}, not 'first', 'last' or 'mean'")
    return hidden[:1] if rows == "first" else hidden[-1:]


@contextmanager
def _as_class_does(model: PackedModel, layout: Layout, positions: torch.Tensor) -> Iterator[None]:
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
