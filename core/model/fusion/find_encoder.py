"""Finds encoder layers that can be fused, replaces them, and compares each with its original.

The counterpart of :mod:`.find_decoder` for post-norm encoders (BERT, RoBERTa, XLM-R, ELECTRA, DistilBERT and
similar ones), with the same method: layers are recognised by their modules, and the result of each is
compared with that of its original, in float32 with noise in norms and biases. If results differ, the
original is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trunkline.core.model.attention import ForwardContext, packed_layout

from .decoder_layer import AttentionCall, Biases, Matrices
from .decoder_modules import Mismatch, activation_name, covered, merged, merged_bias
from .encoder_layer import FusedEmbeddings, FusedEncoderForward, FusedEncoderLayer, LayerNorm
from .origins import origins
from .warm_up import (
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
    warm_up_context,
)

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend

# Attribute paths in known classes: query, key, value; output, norm; the MLP's two linear layers, norm, activation.
_PATHS = (
    (
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("attention.output.dense", "attention.output.LayerNorm"),
        ("intermediate.dense", "output.dense", "output.LayerNorm", "intermediate.intermediate_act_fn"),
    ),
    (
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        ("attention.out_lin", "sa_layer_norm"),
        ("ffn.lin1", "ffn.lin2", "output_layer_norm", "ffn.activation"),
    ),
)


@dataclass(frozen=True, slots=True)
class EncoderModules:
    """The modules of an encoder layer; its norms are applied after attention and MLP, with the residual added."""

    qkv: tuple[nn.Linear, ...]
    out: nn.Linear
    up: nn.Linear
    down: nn.Linear
    attention_norm: LayerNorm
    mlp_norm: LayerNorm
    activation: str

    def matrices(self, backend: Backend) -> Matrices:
        """Merge the linear layers. The result doesn't refer to their modules, so the layer can be freed."""
        linear, biases = backend.linear, self.biases()
        return Matrices(
            qkv=linear(merged(self.qkv), biases.qkv),
            out=linear(self.out.weight, biases.out),
            gate_up=linear(self.up.weight, biases.gate_up),
            down=linear(self.down.weight, biases.down),
        )

    def biases(self) -> Biases:
        return Biases(merged_bias(self.qkv), self.out.bias, self.up.bias, self.down.bias)

    def layer(self, call: AttentionCall, matrices: Matrices) -> FusedEncoderLayer:
        return FusedEncoderLayer(call, matrices, self.attention_norm, self.mlp_norm, self.activation)


def fuse_encoder(base: Any, layers: nn.ModuleList, backend: Backend, report: FuseReport) -> bool:
    """Replace an encoder's ``layers`` by fused ones, in place, and add them to ``report``.

    False, and nothing is changed, if the warm-up pass fails. Never raises for an unknown kind of layer.
    """
    warmed = replace_layers(
        base, layers, backend, report, lambda index, layer, observed: _replace(index, layer, observed, backend)
    )
    if warmed is not None and not report.kept:
        report.fused_forward = _fuse_forward(base, layers, warmed[1], backend)
    return warmed is not None


def encoder_modules(layer: Any, backend: Backend) -> EncoderModules:
    """The modules of an encoder layer; Mismatch if one is missing, or none of the backend's operations computes it."""
    for qkv_paths, out_paths, mlp_paths in _PATHS:
        found = [_at(layer, path) for path in (*qkv_paths, *out_paths, *mlp_paths)]
        if all(module is not None for module in found):
            break
    else:
        raise Mismatch("another kind of attention or MLP")
    *qkv, out, attention_norm, up, down, mlp_norm, function = found
    if any(type(module) is not nn.Linear for module in (*qkv, out, up, down)):
        raise Mismatch("linear layers of another kind")
    if any(type(module) is not nn.LayerNorm for module in (attention_norm, mlp_norm)):
        raise Mismatch("norms of another kind")
    activation = activation_name(function, backend, out.weight.device)
    if not activation:
        raise Mismatch("another activation")
    if not covered(layer, [*qkv, out, up, down, attention_norm, mlp_norm]):
        raise Mismatch("parameters beyond those of the common encoder layer")
    return EncoderModules(
        qkv=tuple(qkv),
        out=out,
        up=up,
        down=down,
        attention_norm=_norm(attention_norm, backend),
        mlp_norm=_norm(mlp_norm, backend),
        activation=activation,
    )


def encoder_layers(base: Any) -> nn.ModuleList | None:
    """The ``ModuleList`` of layers that have attention; None unless there is exactly one."""
    found = [
        module
        for module in base.modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(hasattr(layer, "attention") for layer in module)
    ]
    return found[0] if len(found) == 1 else None


def _at(owner: Any, path: str) -> Any:
    """The attribute at a dotted path; None if there is none."""
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _norm(module: nn.LayerNorm, backend: Backend) -> LayerNorm:
    weight, bias = module.weight, module.bias
    width = module.normalized_shape[0]
    scale = torch.ones(width) if weight is None else weight.detach().float().clone()
    shift = torch.zeros_like(scale) if bias is None else bias.detach().float().clone()
    return LayerNorm(scale, shift, module.eps, backend.layer_norm)


def _replace(index: int, layer: Any, observed: ObservedLayer, backend: Backend) -> FusedEncoderLayer:
    """The verified replacement of one layer; Mismatch if there is none."""
    if observed.call is None:
        raise Mismatch("attention that doesn't call ours")
    modules, call = encoder_modules(layer, backend), replace(observed.call, layer=index)
    matrices = modules.matrices(backend)
    check_layer(index, lambda: _error(layer, call, matrices, observed, backend))
    fused = modules.layer(call, matrices)
    linears = ((matrices.qkv, modules.qkv), (matrices.out, (modules.out,)), (matrices.gate_up, (modules.up,)))
    fused.origins = origins(layer, (*linears, (matrices.down, (modules.down,))))
    return fused


def _error(layer: Any, call: AttentionCall, matrices: Matrices, observed: ObservedLayer, backend: Backend) -> float:
    """The fused layer's largest relative error over all tokens, in float32 with noise."""
    original = noisy_copy(layer, {})
    modules = encoder_modules(original, backend)
    candidate = modules.layer(call, noisy_matrices(layer, matrices, modules, backend))
    hidden = observed.hidden.float()
    half = hidden.shape[1] // 2
    context = ForwardContext(packed_layout([half, hidden.shape[1] - half]), None, backend)
    keywords = {**observed.keywords, "trunk": context}
    expected = original(hidden, **keywords)
    return float((max_abs(candidate(hidden, **keywords) - expected) / max_abs(expected)).max())


def _embeddings(module: Any, backend: Backend) -> FusedEmbeddings | None:
    """Fused embeddings equivalent to ``module``; None if it has other modules than expected."""
    found = [
        getattr(module, name, None) for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    ]
    norm = getattr(module, "LayerNorm", None)
    tables = [table for table in found if isinstance(table, nn.Embedding)]
    if found[0] is None or found[1] is None or type(norm) is not nn.LayerNorm or not covered(module, [*tables, norm]):
        return None
    words, positions, *types = (table.weight for table in tables)
    return FusedEmbeddings(words, positions, types[0] if types else None, _norm(norm, backend))


def _fuse_forward(base: Any, layers: nn.ModuleList, output: Any, backend: Backend) -> bool:
    """Replace the base model's ``forward`` by :class:`.FusedEncoderForward`; returns whether that was possible.

    All outputs must equal the original ones, with and without token types.
    """
    if not isinstance(getattr(base, "embeddings", None), nn.Module):
        return False
    typed: dict[str, Any] = {}
    if (getattr(base.config, "type_vocab_size", None) or 0) > 1:
        tokens = output.last_hidden_state.shape[1]
        typed["token_type_ids"] = (torch.arange(tokens, device=base.device) >= tokens // 2).long()[None]

    def results() -> list[torch.Tensor]:
        both = [run(base, warm_up_context(base, backend), **given) for given in ({}, typed)]
        return [tensor for one in both for tensor in one.to_tuple()]

    def error(embeddings: Any) -> float:
        expected = [*output.to_tuple(), *results()[len(output) :]]
        fused: list[Any] = list(layers)
        like = output.last_hidden_state[0, :0].clone()
        base.forward = FusedEncoderForward(base, fused, type(output), embeddings, backend, like)
        return max(relative_error(mine, theirs) for mine, theirs in zip(results(), expected, strict=True))

    for embeddings in (_embeddings(base.embeddings, backend), base.embeddings):
        if embeddings is not None and check_fused_forward(
            base, output.last_hidden_state.dtype, partial(error, embeddings)
        ):
            base.forward.verify(TOLERANCE)
            return True
        base.__dict__.pop("forward", None)
    return False
