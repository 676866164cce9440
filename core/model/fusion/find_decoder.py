"""Finds decoder layers that can be fused, replaces them, and compares each with its original.

Layers are recognised by their modules. A layer's arguments of attention are observed in a warm-up pass.
Layers with the same modules may still compute different things, because ``forward`` may contain multipliers. So
the result of each fused layer is compared with that of its original, in float32. Noise is added to norms
and biases, since some checkpoints leave them at 1 and 0, which would hide errors. If results differ, the
original is kept.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trunkline.core.model.architecture import output_matrix
from trunkline.core.model.attention import ForwardContext, packed_layout

from .decoder_forward import FusedForward
from .decoder_layer import AttentionCall, FusedLayer, Matrices
from .decoder_modules import Mismatch, decoder_modules, norm_of
from .find_encoder import encoder_layers, fuse_encoder
from .pack import pack_weights
from .warm_up import (
    ROUNDING,
    TOLERANCE,
    FuseReport,
    ObservedLayer,
    check_fused_forward,
    check_layer,
    max_abs,
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
    """Replace layers of a loaded transformers ``model`` on the backend's device by fused ones, in place.

    Each original's memory is freed when it is replaced. Never raises for an unknown kind of model; it is
    left unchanged.
    """
    report = FuseReport()
    base = model.base_model
    understood = True
    if (layers := _decoder_layers(base)) is not None:
        understood = _fuse_decoder(base, layers, backend, report)
    elif (layers := encoder_layers(base)) is not None:
        understood = fuse_encoder(base, layers, backend, report)
    report.head = understood and _replace_head(model, backend)
    log.info(
        "%s: %s; fused forward pass: %s; replaced output matrix: %s",
        type(model).__name__, report.sentence, report.fused_forward, report.head,
    )  # fmt: skip
    return report


def _fuse_decoder(base: Any, layers: nn.ModuleList, backend: Backend, report: FuseReport) -> bool:
    """The counterpart of :func:`.find_encoder.fuse_encoder` for decoders, with the same result."""
    warmed = replace_layers(
        base, layers, backend, report, lambda _, layer, observed: _replace(layer, observed, backend)
    )
    if warmed is not None and not report.kept:
        report.fused_forward = _fuse_forward(base, layers, *warmed, backend)
    return warmed is not None


def _decoder_layers(base: Any) -> nn.ModuleList | None:
    layers = getattr(base, "layers", None)
    if isinstance(layers, nn.ModuleList) and len(layers) and all(hasattr(layer, "self_attn") for layer in layers):
        return layers
    return None


def _replace(layer: Any, observed: ObservedLayer, backend: Backend) -> FusedLayer:
    """The verified replacement of one layer; Mismatch if there is none."""
    if observed.call is None:
        raise Mismatch("attention with sinks or with values of another width")
    if "position_embeddings" not in observed.keywords:
        raise Mismatch("no rotary embedding")
    modules = decoder_modules(layer, backend)
    call = replace(observed.call, layer=modules.index)
    if modules.norms.queries is not None and len(modules.norms.queries.weight) != call.width:
        raise Mismatch("queries are normalised over all heads together")
    matrices = modules.matrices(backend)
    check_layer(modules.index, lambda: _error(layer, call, matrices, observed, backend))
    if (mlp := modules.other_mlp) is not None:
        pack_weights(mlp, backend)
        mlp.forward = backend.row_invariant(mlp.forward)
    fused = FusedLayer(call, matrices, modules.norms, modules.activation, mlp)
    fused.origins = modules.origins(layer, matrices)
    return fused


def _error(layer: Any, call: AttentionCall, matrices: Matrices, observed: ObservedLayer, backend: Backend) -> float:
    """The fused layer's largest relative error over all tokens, in float32 with noise.

    It is relative to what the layer adds to its input.
    """
    mlp = decoder_modules(layer, backend).other_mlp  # a kept MLP is left out of the comparison
    original = noisy_copy(layer, {} if mlp is None else {id(mlp): nn.Identity()})
    modules = decoder_modules(original, backend)
    noisy = noisy_matrices(layer, matrices, modules, backend)
    candidate = FusedLayer(call, noisy, modules.norms, modules.activation, modules.other_mlp)
    hidden = observed.hidden.float()
    cos, sin = observed.keywords["position_embeddings"]
    layout = packed_layout([hidden.shape[1]])
    keywords = {**observed.keywords, "position_embeddings": (cos.float(), sin.float())}
    keywords["trunk"] = ForwardContext(layout, None, backend)
    expected = original(hidden, **keywords)
    difference = max_abs(candidate(hidden, **keywords) - expected)
    # The input of some tokens is a thousand times what the layer adds, so the sum's rounding error counts, too.
    scale = max_abs(expected - hidden) + ROUNDING / TOLERANCE * max_abs(hidden)
    return float((difference / scale).max())


def _fuse_forward(
    base: Any, layers: nn.ModuleList, observed: list[ObservedLayer], output: Any, backend: Backend
) -> bool:
    """Replace the base model's ``forward`` by :class:`.FusedForward`; returns whether that was possible.

    All layers must share one rotary embedding, and the result must equal ``output``.
    """
    expected = output.last_hidden_state
    embeddings = {id(one.keywords["position_embeddings"]) for one in observed}
    norm = norm_of(base.norm, backend) if isinstance(getattr(base, "norm", None), nn.Module) else None
    if len(embeddings) != 1 or norm is None or not hasattr(base, "embed_tokens") or not hasattr(base, "rotary_emb"):
        return False
    fused: list[Any] = list(layers)
    like = [expected[0], *(each[0] for each in observed[0].keywords["position_embeddings"])]
    like = [one[:0].clone() for one in like]  # without the memory of the warm-up pass
    base.forward = fused_forward = FusedForward(base, fused, norm, type(output), backend, like)

    def error() -> float:
        return relative_error(run(base, warm_up_context(base, backend)).last_hidden_state, expected)

    if check_fused_forward(base, expected.dtype, error):
        fused_forward.verify(TOLERANCE)
        return True
    del base.forward
    return False


def _replace_head(model: Any, backend: Backend) -> bool:
    """Replace the output matrix by a linear layer of the backend, unless its logits differ; returns whether it was."""
    head = output_matrix(model)
    if type(head) is not nn.Linear:
        return False
    # float32 results: from 16 on, bfloat16 numbers are 1/8 apart, so rounded logits would have ties.
    replacement = backend.linear(head.weight, head.bias, float32_out=True)
    rows = torch.randn(4, head.in_features, generator=torch.Generator().manual_seed(2)).to(head.weight)
    expected = head(rows).float()
    error = relative_error(replacement(rows), expected)
    if error > tolerance(head.weight.dtype):
        log.warning(
            "%s: the output matrix isn't replaced, its relative error would be %.1e", type(model).__name__, error
        )
        return False
    # Not with set_output_embeddings: in some classes it needs a bias that is a parameter.
    name = next(name for name, module in model.named_modules() if module is head)
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, replacement)
    return True
