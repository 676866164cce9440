"""Shared by :mod:`.find_decoder` and :mod:`.find_encoder`: the warm-up pass, verification with noise, the report."""

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
from .decoder_modules import Mismatch

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend

log = logging.getLogger("trunkline.model")

TOKENS = 24  # of the warm-up sequence
TOLERANCE = 1e-4  # of a layer: relative to what it adds to its input
ROUNDING = 1e-6  # allowed in addition: relative to the input
LOW_PRECISION = 0.1  # tolerance of the whole forward pass in dtypes narrower than float32
NOISE = 0.3  # standard deviation


@dataclass(slots=True)
class FuseReport:
    """Which layers were fused, and why the others were kept."""

    fused: list[int] = field(default_factory=list)
    kept: dict[int, str] = field(default_factory=dict)
    fused_forward: bool = False  # whether the base model's forward is replaced, too
    head: bool = False  # whether the output matrix is replaced

    @property
    def sentence(self) -> str:
        """The report as one sentence, for logs and model info."""
        total = len(self.fused) + len(self.kept)
        if not total:
            return "no layers to fuse found"
        text = f"{len(self.fused)} of {total} layers fused"
        if self.kept:
            reasons = sorted(set(self.kept.values()))
            text += f"; the others keep transformers' forward: {'; '.join(reasons)}"
        return text


@dataclass(slots=True)
class ObservedLayer:
    """One layer in the warm-up pass: its input [1, T, H], its keyword arguments, its call of attention."""

    hidden: torch.Tensor
    keywords: dict[str, Any]
    call: AttentionCall | None = None


class LayerModules(Protocol):
    """The interface of a layer's modules, of decoders and of encoders."""

    def matrices(self, backend: Backend) -> Matrices: ...

    def biases(self) -> Biases: ...


class _Recorder:
    """Replaces the backend in the warm-up pass: stores each call's arguments and passes the call on."""

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
    replacement: Callable[[int, Any, ObservedLayer], nn.Module],
) -> tuple[list[ObservedLayer], Any] | None:
    """Replace each layer by ``replacement(index, layer, observed)``, unless that raises Mismatch.

    Returns what was observed of each layer in the warm-up pass, and the pass's output; None if the pass fails.
    """
    try:
        observed, output = _warm_up(base, layers, backend)
    except Exception as error:  # foreign code may raise anything
        log.info("%s: not fused, the warm-up pass failed: %s", type(base).__name__, error)
        return None
    for index in range(len(layers)):
        try:
            layers[index] = replacement(index, layers[index], observed[index])
            report.fused.append(index)
        except Mismatch as error:
            report.kept[index] = str(error)
    return observed, output


def _warm_up(base: Any, layers: nn.ModuleList, backend: Backend) -> tuple[list[ObservedLayer], Any]:
    """Run one pass; returns what was observed of each layer, and the pass's output."""
    recorder = _Recorder(backend)
    observed: list[ObservedLayer] = []

    def before(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        keywords = dict(keywords)
        hidden = args[0] if args else keywords.pop("hidden_states")
        recorder.last = None
        observed.append(ObservedLayer(hidden.clone(), keywords))

    def after(module: nn.Module, _: Any, __: Any) -> None:
        observed[-1].call = recorder.last

    with _hooks(layers, before, after):
        output = run(base, warm_up_context(base, recorder))
    if len(observed) != len(layers):
        raise ValueError(f"{len(observed)} of {len(layers)} layers were called")
    return observed, output


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
    """The context of one sequence of TOKENS, or of fewer if the model has fewer positions."""
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    return ForwardContext(packed_layout([min(TOKENS, limit)]), None, backend)


def run(base: Any, context: ForwardContext, **given: Any) -> Any:
    """Run one pass over arbitrary ids; ``given`` are further arguments of the model."""
    positions = torch.arange(int(context.layout.kv_len[0]), device=base.device)[None]
    ids = (positions * 7919 + 11) % base.get_input_embeddings().num_embeddings
    return base(input_ids=ids, position_ids=positions, past_key_values=None, use_cache=False, trunk=context, **given)


def check_layer(index: int, error: Callable[[], float]) -> None:
    """Mismatch unless ``error()``, a fused layer's relative error, is at most TOLERANCE; also if it raises."""
    try:
        found = error()
    except (RuntimeError, TypeError, ValueError, AttributeError) as trouble:
        raise Mismatch(f"the comparison fails with: {trouble}") from trouble
    if not found <= TOLERANCE:
        log.info("layer %d has a relative error of %.1e when fused", index, found)
        raise Mismatch("forward does more than its modules show")


def check_fused_forward(base: Any, dtype: torch.dtype, error: Callable[[], float]) -> bool:
    """Whether ``error()``, the relative error of the fused forward pass, is small enough; False if it raises."""
    try:
        return error() <= tolerance(dtype)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as trouble:
        log.info("%s keeps transformers' forward pass over its layers: %s", type(base).__name__, trouble)
        return False


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative error allowed in a comparison without noise."""
    return TOLERANCE if dtype == torch.float32 else LOW_PRECISION


def relative_error(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """The relative error of ``mine`` by norm; infinite for NaN, which ``max`` would ignore."""
    error = float((mine - theirs).float().norm() / theirs.float().norm())
    return error if error >= 0 else float("inf")


def noisy_matrices(layer: Any, matrices: Matrices, noisy: LayerModules, backend: Backend) -> Matrices:
    """The matrices of a noisy copy's modules. A float32 layer's own ones, with the noisy biases, save memory."""
    shared = next(layer.parameters()).dtype == torch.float32
    return matrices.with_biases(noisy.biases()) if shared else noisy.matrices(backend)


def max_abs(rows: torch.Tensor) -> torch.Tensor:
    """The largest absolute value of each token's row."""
    return rows.abs().amax(dim=-1)


def noisy_copy(layer: Any, shared: dict[int, Any]) -> Any:
    """A copy of the layer in float32, with noise in norms and biases.

    Not copied, but shared, are configs, matrices that already are float32, and the objects in ``shared``,
    a mapping from ``id`` to what replaces them.
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
            parameter += NOISE * torch.randn(parameter.shape, generator=noise).to(parameter.device)
    return noisy
