"""Find decoder layers that :class:`FusedLayer` can do, replace them, and prove each replacement.

Layers are recognised by their parts; what a layer hands to attention is seen in a warm-up pass.
That two layers have the same parts doesn't make them the same (multipliers live in ``forward``),
so each fused layer must give what its original gives, in float32, with noise in norms and biases
that a fresh or careless checkpoint leaves at 1 and 0. Otherwise the original stays.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trunkline.kernels.linear import PackedLinear

from .attention import ForwardContext, packed_layout
from .fused import AttentionCall, FusedLayer, Matrices, Walk
from .parts import Mismatch, norm_of, parts_of
from .recorded import plays_back

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
class _Seen:
    """One layer in the warm-up pass: its keywords, its input [1, T, H], its call of attention."""

    hidden: torch.Tensor
    keywords: dict[str, Any]
    call: AttentionCall | None = None


@torch.inference_mode()
def fuse(model: Any, backend: Backend) -> FuseReport:
    """Replace what can be replaced in a loaded transformers ``model`` on the CPU, in place.

    The originals' memory is freed as their replacements take over. Never raises for a model that
    it doesn't understand: such a model stays as it is.
    """
    report = FuseReport()
    base = model.base_model
    layers = _decoder_layers(base)
    if layers is not None:
        try:
            seen, output = _warm_up(base, layers, backend)
        except Exception as error:  # whatever a foreign forward raises
            log.info("%s: not fused, the warm-up pass failed: %s", type(model).__name__, error)
            return report
        for index in range(len(layers)):
            try:
                layers[index] = _replace(layers[index], seen[index], backend)
                report.fused.append(index)
            except Mismatch as error:
                report.kept[index] = str(error)
        if not report.kept:
            report.walk = _walk(base, layers, seen, output, backend)
    report.head = _pack_head(model)
    log.info("%s: %s", type(model).__name__, report.sentence)
    return report


def _decoder_layers(base: Any) -> nn.ModuleList | None:
    layers = getattr(base, "layers", None)
    if isinstance(layers, nn.ModuleList) and len(layers) and all(hasattr(layer, "self_attn") for layer in layers):
        return layers
    return None


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


def _warm_up(base: Any, layers: nn.ModuleList, backend: Backend) -> tuple[list[_Seen], Any]:
    """What each layer got and did in one pass, and the pass's output."""
    recorder = _Recorder(backend)
    seen: list[_Seen] = []

    def before(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        keywords = dict(keywords)
        hidden = args[0] if args else keywords.pop("hidden_states")
        recorder.last = None
        seen.append(_Seen(hidden.clone(), keywords))

    def after(module: nn.Module, _: Any, __: Any) -> None:
        seen[-1].call = recorder.last

    with _hooks(layers, before, after):
        output = _run(base, _context(base, recorder))
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


def _context(base: Any, backend: Any) -> ForwardContext:
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    return ForwardContext(packed_layout([min(TOKENS, limit)]), None, backend)


def _run(base: Any, context: ForwardContext) -> Any:
    tokens = int(context.layout.kv_len[0])
    ids = (torch.arange(tokens) * 7919 + 11) % base.get_input_embeddings().num_embeddings
    places = torch.arange(tokens)[None]
    return base(input_ids=ids[None], position_ids=places, past_key_values=None, use_cache=False, trunk=context)


def _replace(layer: Any, seen: _Seen, backend: Backend) -> FusedLayer:
    """The proven replacement of one layer; Mismatch when there is none."""
    if seen.call is None:
        raise Mismatch("attention with sinks or with values of another width")
    if "position_embeddings" not in seen.keywords:
        raise Mismatch("no rotary embedding")
    parts = parts_of(layer)
    call = replace(seen.call, layer=parts.index)
    if parts.norms.queries is not None and len(parts.norms.queries.weight) != call.width:
        raise Mismatch("queries are normalised over all heads together")
    matrices = parts.matrices()
    try:
        error = _error(layer, call, matrices, seen, backend)
    except (RuntimeError, TypeError, ValueError, AttributeError) as trouble:
        raise Mismatch(f"the proof fails with: {trouble}") from trouble
    if not error <= TOLERANCE:
        log.info("layer %d is off by %.1e from its original when fused", parts.index, error)
        raise Mismatch("forward does more than its parts say")
    return FusedLayer(call, matrices, parts.norms, parts.activation, parts.other_mlp)


def _error(layer: Any, call: AttentionCall, matrices: Matrices, seen: _Seen, backend: Backend) -> float:
    """How far the fused layer is from its original, in float32 with noise: the worst token's share of what is added."""
    original = _noisy_copy(layer)
    parts = parts_of(original)
    if next(layer.parameters()).dtype == torch.float32:
        matrices = matrices.with_biases(parts.biases())
    else:
        matrices = parts.matrices()
    candidate = FusedLayer(call, matrices, parts.norms, parts.activation, parts.other_mlp)
    hidden = seen.hidden.float()
    cos, sin = seen.keywords["position_embeddings"]
    layout = packed_layout([hidden.shape[1]])
    keywords = {**seen.keywords, "position_embeddings": (cos.float(), sin.float())}
    keywords["trunk"] = ForwardContext(layout, None, backend)
    expected = original(hidden, **keywords)
    difference = _largest(candidate(hidden, **keywords) - expected)
    # Some tokens' residuals are a thousand times what a layer adds; what is added is rounded to them.
    scale = _largest(expected - hidden) + ROUNDING / TOLERANCE * _largest(hidden)
    return float((difference / scale).max())


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """Largest absolute number of each token."""
    return rows.abs().amax(dim=-1)


def _noisy_copy(layer: Any) -> Any:
    """The layer in float32 with noise in norms and biases; an MLP that stays is left out.

    Matrices that are float32 already are shared, not copied.
    """
    shared: dict[int, Any] = {id(layer.self_attn.config): layer.self_attn.config}
    for parameter in layer.parameters():
        if parameter.ndim > 1 and parameter.dtype == torch.float32:
            shared[id(parameter)] = parameter
    mlp = parts_of(layer).other_mlp
    if mlp is not None:
        shared[id(mlp)] = nn.Identity()
    noisy = copy.deepcopy(layer, shared).float()
    noise = torch.Generator().manual_seed(1)
    for parameter in noisy.parameters():
        if parameter.ndim == 1:
            parameter += NOISE * torch.randn(parameter.shape, generator=noise)
    return noisy


def _walk(base: Any, layers: nn.ModuleList, seen: list[_Seen], output: Any, backend: Backend) -> bool:
    """Call fused layers one after another, if all share the rotary embedding and the result stays the same."""
    expected = output.last_hidden_state
    embeddings = {id(one.keywords["position_embeddings"]) for one in seen}
    norm = norm_of(base.norm) if isinstance(getattr(base, "norm", None), nn.Module) else None
    if len(embeddings) != 1 or norm is None or not hasattr(base, "embed_tokens") or not hasattr(base, "rotary_emb"):
        return False
    base.forward = walk = Walk(base, list(layers), norm, type(output))  # type: ignore[arg-type]
    try:
        result = _run(base, _context(base, backend)).last_hidden_state
        error = float((result - expected).float().norm() / expected.float().norm())
    except (RuntimeError, TypeError, ValueError, AttributeError) as trouble:
        log.info("%s keeps transformers' loop over layers: %s", type(base).__name__, trouble)
        error = float("inf")
    if error <= (TOLERANCE if expected.dtype == torch.float32 else LOW_PRECISION):
        turned = seen[0].keywords["position_embeddings"][0].shape[-1]
        walk.playback = plays_back(walk.layers, expected.shape[-1], turned, backend, TOLERANCE)
        return True
    del base.forward
    return False


def _pack_head(model: Any) -> bool:
    """Pack the matrix that makes logits, in whose place other modules find it; not when it gives other logits."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return False
    if type(head) is not nn.Linear:
        return False
    packed = PackedLinear(head.weight, head.bias)
    rows = torch.randn(4, head.in_features, generator=torch.Generator().manual_seed(2)).to(head.weight.dtype)
    expected = head(rows).float()
    error = float((packed(rows).float() - expected).norm() / expected.norm())
    if not error <= (TOLERANCE if head.weight.dtype == torch.float32 else LOW_PRECISION):
        log.warning("%s: the output matrix is off by %.1e when packed and stays as it is", type(model).__name__, error)
        return False
    model.set_output_embeddings(packed)
    return True
