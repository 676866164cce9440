"""What both searches for fusible layers share: the warm-up pass, its noise, the report."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from trunkline.core.model.attention import ForwardContext, packed_layout

from .decoder_layer import AttentionCall, Biases, Matrices
from .decoder_parts import Mismatch

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend

log = logging.getLogger("trunkline.model")

TOKENS = 24  # of the warm-up sequence
TOLERANCE = 1e-4  # relative to what a layer adds to its input
ROUNDING = 1e-6  # relative to the input that it is added to
LOW_PRECISION = 0.1  # the walk over layers, in dtypes narrower than float32
NOISE = 0.3


@dataclass(slots=True)
class FuseReport:
    """Numbers of fused layers, and why the others stayed."""

    fused: list[int] = field(default_factory=list)
    kept: dict[int, str] = field(default_factory=dict)
    walk: bool = False  # are layers called without transformers' loop?
    head: bool = False  # is the output matrix packed?

    @property
    def sentence(self) -> str:
        """For logs and model info."""
        total = len(self.fused) + len(self.kept)
        if not total:
            return "no layers to fuse found"
        text = f"{len(self.fused)} of {total} layers fused"
        if self.kept:
            reasons = sorted(set(self.kept.values()))
            text += f"; the others keep transformers' forward: {'; '.join(reasons)}"
        return text


@dataclass(slots=True)
class Seen:
    """One layer in the warm-up pass: its keywords, its input [1, T, H], its call of attention."""

    hidden: torch.Tensor
    keywords: dict[str, Any]
    call: AttentionCall | None = None


class Parts(Protocol):
    """A layer's parts, as both searches find them."""

    def matrices(self) -> Matrices: ...

    def biases(self) -> Biases: ...


class _Recorder:
    """Stands in for the backend: notes each call, then lets the backend do it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.last: AttentionCall | None = None

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: Any, values: Any, layout: Any, **options: Any
    ) -> torch.Tensor:
        if q.shape[2] == v.shape[2] and options.get("sinks") is None:
            given = {name: value for name, value in options.items() if name != "sinks"}
            self.last = AttentionCall(layer=-1, heads=q.shape[1], kv_heads=k.shape[1], width=q.shape[2], **given)
        return self.backend.attention(q, k, v, keys, values, layout, **options)


def replace_layers(
    base: Any,
    layers: nn.ModuleList,
    backend: Backend,
    report: FuseReport,
    replacement: Callable[[int, Any, Seen], nn.Module],
) -> tuple[list[Seen], Any] | None:
    """Put ``replacement(index, layer, seen)`` in place of each layer for which it raises no Mismatch.

    What layers got and did in the warm-up pass, and its output; None when the model can't do one.
    """
    try:
        seen, output = _warm_up(base, layers, backend)
    except Exception as error:  # whatever a foreign forward raises
        log.info("%s: not fused, the warm-up pass failed: %s", type(base).__name__, error)
        return None
    for index in range(len(layers)):
        try:
            layers[index] = replacement(index, layers[index], seen[index])
            report.fused.append(index)
        except Mismatch as error:
            report.kept[index] = str(error)
    return seen, output


def _warm_up(base: Any, layers: nn.ModuleList, backend: Backend) -> tuple[list[Seen], Any]:
    """What each layer got and did in one pass, and the pass's output."""
    recorder = _Recorder(backend)
    seen: list[Seen] = []

    def before(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        keywords = dict(keywords)
        hidden = args[0] if args else keywords.pop("hidden_states")
        recorder.last = None
        seen.append(Seen(hidden.clone(), keywords))

    def after(module: nn.Module, _: Any, __: Any) -> None:
        seen[-1].call = recorder.last

    with _hooks(layers, before, after):
        output = run(base, warm_up_context(base, recorder))
    if len(seen) != len(layers):
        raise ValueError(f"{len(seen)} of {len(layers)} layers were called")
    return seen, output


@contextmanager
def _hooks(layers: nn.ModuleList, before: Any, after: Any) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def warm_up_context(base: Any, backend: Any) -> ForwardContext:
    """Of one sequence of TOKENS, or fewer if the model can't do so many."""
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    return ForwardContext(packed_layout([min(TOKENS, limit)]), None, backend)


def run(base: Any, context: ForwardContext, **given: Any) -> Any:
    """One pass over arbitrary ids; ``given`` goes to the model, too."""
    tokens = int(context.layout.kv_len[0])
    ids = (torch.arange(tokens) * 7919 + 11) % base.get_input_embeddings().num_embeddings
    places = torch.arange(tokens)[None]
    return base(input_ids=ids[None], position_ids=places, past_key_values=None, use_cache=False, trunk=context, **given)


def check_proof(index: int, error: Callable[[], float]) -> None:
    """Mismatch unless ``error()``, how far a fused layer is from its original, can be found and is small enough."""
    try:
        found = error()
    except (RuntimeError, TypeError, ValueError, AttributeError) as trouble:
        raise Mismatch(f"the proof fails with: {trouble}") from trouble
    if not found <= TOLERANCE:
        log.info("layer %d is off by %.1e from its original when fused", index, found)
        raise Mismatch("forward does more than its parts say")


def check_walk(base: Any, dtype: torch.dtype, error: Callable[[], float]) -> bool:
    """Whether ``error()``, how far the walk over fused layers is from transformers' loop, is small enough."""
    try:
        return error() <= tolerance(dtype)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as trouble:
        log.info("%s keeps transformers' loop over layers: %s", type(base).__name__, trouble)
        return False


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative error that a replacement may have where no noise is added."""
    return TOLERANCE if dtype == torch.float32 else LOW_PRECISION


def relative_error(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of all numbers together; infinite for NaN, which ``max`` would pass over."""
    error = float((mine - theirs).float().norm() / theirs.float().norm())
    return error if error >= 0 else float("inf")


def noisy_matrices(layer: Any, matrices: Matrices, noisy: Parts) -> Matrices:
    """The matrices of a noisy copy's parts; those of the layer itself, with other biases, where they are float32."""
    shared = next(layer.parameters()).dtype == torch.float32
    return matrices.with_biases(noisy.biases()) if shared else noisy.matrices()


def largest(rows: torch.Tensor) -> torch.Tensor:
    """Largest absolute number of each token."""
    return rows.abs().amax(dim=-1)


def noisy_copy(layer: Any, shared: dict[int, Any]) -> Any:
    """The layer in float32 with noise in norms and biases; objects in ``shared``, by ``id``, aren't copied.

    Nor are matrices that are float32 already, and configs.
    """
    known = dict(shared)
    for module in layer.modules():
        if (config := getattr(module, "config", None)) is not None:
            known[id(config)] = config
    for parameter in layer.parameters():
        if parameter.ndim > 1 and parameter.dtype == torch.float32:
            known[id(parameter)] = parameter
    noisy = copy.deepcopy(layer, known).float()
    noise = torch.Generator().manual_seed(1)
    for parameter in noisy.parameters():
        if parameter.ndim == 1:
            parameter += NOISE * torch.randn(parameter.shape, generator=noise)
    return noisy
