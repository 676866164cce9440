"""Finds decoder layers that can be fused, replaces them, and compares each with its original.

Layers are recognised by their parts; what a layer hands to attention is seen in a warm-up pass.
That two layers have the same parts doesn't make them the same (multipliers live in ``forward``),
so each fused layer must give what its original gives, in float32, with noise in norms and biases
that a fresh or careless checkpoint leaves at 1 and 0. Otherwise the original stays.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trunkline.core.model.architecture import output_matrix
from trunkline.core.model.attention import ForwardContext, packed_layout
from trunkline.kernels.linear import PackedLinear

from .decoder_layer import AttentionCall, FusedLayer, Matrices, Walk
from .decoder_parts import Mismatch, norm_of, parts_of
from .find_encoder import encoder_layers, fuse_encoder
from .recorded import plays_back
from .warm_up import (
    ROUNDING,
    TOLERANCE,
    FuseReport,
    Seen,
    check_proof,
    check_walk,
    largest,
    noisy_copy,
    noisy_matrices,
    relative_error,
    replace_layers,
    run,
    tolerance,
    warm_up_context,
)

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend

log = logging.getLogger("trunkline.model")


@torch.inference_mode()
def fuse(model: Any, backend: Backend) -> FuseReport:
    """Replace what can be replaced in a loaded transformers ``model`` on the CPU, in place.

    The originals' memory is freed as their replacements take over. Never raises for a model that
    it doesn't understand: such a model stays as it is.
    """
    report = FuseReport()
    base = model.base_model
    understood = True
    if (layers := _decoder_layers(base)) is not None:
        understood = _fuse_decoder(base, layers, backend, report)
    elif (layers := encoder_layers(base)) is not None:
        understood = fuse_encoder(base, layers, backend, report)
    report.head = understood and _pack_head(model)
    log.info("%s: %s", type(model).__name__, report.sentence)
    return report


def _fuse_decoder(base: Any, layers: nn.ModuleList, backend: Backend, report: FuseReport) -> bool:
    """As :func:`.find_encoder.fuse_encoder` does."""
    warmed = replace_layers(base, layers, backend, report, lambda _, layer, seen: _replace(layer, seen, backend))
    if warmed is not None and not report.kept:
        report.walk = _walk(base, layers, *warmed, backend)
    return warmed is not None


def _decoder_layers(base: Any) -> nn.ModuleList | None:
    layers = getattr(base, "layers", None)
    if isinstance(layers, nn.ModuleList) and len(layers) and all(hasattr(layer, "self_attn") for layer in layers):
        return layers
    return None


def _replace(layer: Any, seen: Seen, backend: Backend) -> FusedLayer:
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
    check_proof(parts.index, lambda: _error(layer, call, matrices, seen, backend))
    fused = FusedLayer(call, matrices, parts.norms, parts.activation, parts.other_mlp)
    fused.origins = parts.origins(layer, matrices)
    return fused


def _error(layer: Any, call: AttentionCall, matrices: Matrices, seen: Seen, backend: Backend) -> float:
    """How far the fused layer is from its original, in float32 with noise: the worst token's share of what is added."""
    mlp = parts_of(layer).other_mlp  # one that stays is left out
    original = noisy_copy(layer, {} if mlp is None else {id(mlp): nn.Identity()})
    parts = parts_of(original)
    candidate = FusedLayer(call, noisy_matrices(layer, matrices, parts), parts.norms, parts.activation, parts.other_mlp)
    hidden = seen.hidden.float()
    cos, sin = seen.keywords["position_embeddings"]
    layout = packed_layout([hidden.shape[1]])
    keywords = {**seen.keywords, "position_embeddings": (cos.float(), sin.float())}
    keywords["trunk"] = ForwardContext(layout, None, backend)
    expected = original(hidden, **keywords)
    difference = largest(candidate(hidden, **keywords) - expected)
    # Some tokens' residuals are a thousand times what a layer adds; what is added is rounded to them.
    scale = largest(expected - hidden) + ROUNDING / TOLERANCE * largest(hidden)
    return float((difference / scale).max())


def _walk(base: Any, layers: nn.ModuleList, seen: list[Seen], output: Any, backend: Backend) -> bool:
    """Call fused layers one after another, if all share the rotary embedding and the result stays the same."""
    expected = output.last_hidden_state
    embeddings = {id(one.keywords["position_embeddings"]) for one in seen}
    norm = norm_of(base.norm) if isinstance(getattr(base, "norm", None), nn.Module) else None
    if len(embeddings) != 1 or norm is None or not hasattr(base, "embed_tokens") or not hasattr(base, "rotary_emb"):
        return False
    base.forward = walk = Walk(base, list(layers), norm, type(output))  # type: ignore[arg-type]

    def error() -> float:
        return relative_error(run(base, warm_up_context(base, backend)).last_hidden_state, expected)

    if check_walk(base, expected.dtype, error):
        turned = seen[0].keywords["position_embeddings"][0].shape[-1]
        walk.playback = plays_back(walk.layers, expected.shape[-1], turned, expected.dtype, backend, TOLERANCE)
        return True
    del base.forward
    return False


def _pack_head(model: Any) -> bool:
    """Replace the linear layer that makes logits by a packed one; not when that gives other logits."""
    head = output_matrix(model)
    if type(head) is not nn.Linear:
        return False
    # Logits of 16 and more are an eighth apart in bfloat16: ties and wrong winners that the sums don't have.
    packed = PackedLinear(head.weight, head.bias, wide=True)
    rows = torch.randn(4, head.in_features, generator=torch.Generator().manual_seed(2)).to(head.weight.dtype)
    expected = head(rows).float()
    error = relative_error(packed(rows), expected)
    if error > tolerance(head.weight.dtype):
        log.warning("%s: the output matrix is off by %.1e when packed and stays as it is", type(model).__name__, error)
        return False
    # Not by set_output_embeddings: in some classes it needs a bias that is a parameter.
    name = next(name for name, module in model.named_modules() if module is head)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, packed)
    return True
