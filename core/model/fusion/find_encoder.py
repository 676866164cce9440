"""Finds encoder layers that can be fused, replaces them, and compares each with its original.

The counterpart of :mod:`.find_decoder` for encoders with norms after their residuals (BERT, RoBERTa,
XLM-R, ELECTRA, DistilBERT and what is built like them), by the same method: layers are recognised
by their parts, and each must give what its original gives, in float32 with noise in norms and
biases. Otherwise the original stays.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trunkline.core.model.attention import ForwardContext, packed_layout
from trunkline.kernels.linear import PackedLinear

from .decoder_layer import AttentionCall, Biases, Matrices
from .decoder_parts import Mismatch, activation_name, covered, merged, merged_bias
from .encoder_layer import EncoderWalk, FusedEmbeddings, FusedEncoderLayer, LayerNorm
from .origins import origins
from .warm_up import (
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
    warm_up_context,
)

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend

log = logging.getLogger("trunkline.model")

# Where classes keep queries, keys, values; output; norm; the two maps of the MLP; norm; activation.
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
class EncoderParts:
    """A layer's parts; norms come after attention and MLP, each with its residual added."""

    qkv: tuple[nn.Linear, ...]
    out: nn.Linear
    up: nn.Linear
    down: nn.Linear
    attention_norm: LayerNorm
    mlp_norm: LayerNorm
    activation: str

    def matrices(self) -> Matrices:
        """Merged and packed; the caller may drop the layer then."""
        biases = self.biases()
        return Matrices(
            qkv=PackedLinear(merged(self.qkv), biases.qkv),
            out=PackedLinear(self.out.weight, biases.out),
            gate_up=PackedLinear(self.up.weight, biases.gate_up),
            down=PackedLinear(self.down.weight, biases.down),
        )

    def biases(self) -> Biases:
        return Biases(merged_bias(self.qkv), self.out.bias, self.up.bias, self.down.bias)

    def layer(self, call: AttentionCall, matrices: Matrices) -> FusedEncoderLayer:
        return FusedEncoderLayer(call, matrices, self.attention_norm, self.mlp_norm, self.activation)


def fuse_encoder(base: Any, layers: nn.ModuleList, backend: Backend, report: FuseReport) -> bool:
    """Replace what can be replaced of an encoder's ``layers`` on the CPU, in place, and add it to ``report``.

    False, and nothing changed, when the model doesn't do a warm-up pass. Never raises.
    """
    warmed = replace_layers(
        base, layers, backend, report, lambda index, layer, seen: _replace(index, layer, seen, backend)
    )
    if warmed is not None and not report.kept:
        report.walk = _walk(base, layers, warmed[1], backend)
    return warmed is not None


def encoder_parts(layer: Any) -> EncoderParts:
    """The parts of an encoder layer; Mismatch when it has too few, or some that aren't known."""
    for maps, ends, mlp in _PATHS:
        found = [_at(layer, path) for path in (*maps, *ends, *mlp)]
        if all(module is not None for module in found):
            break
    else:
        raise Mismatch("another kind of attention or MLP")
    *qkv, out, attention_norm, up, down, mlp_norm, function = found
    if any(type(module) is not nn.Linear for module in (*qkv, out, up, down)):
        raise Mismatch("linear maps of another kind")
    if any(type(module) is not nn.LayerNorm for module in (attention_norm, mlp_norm)):
        raise Mismatch("norms of another kind")
    activation = activation_name(function)
    if not activation:
        raise Mismatch("another activation")
    if not covered(layer, [*qkv, out, up, down, attention_norm, mlp_norm]):
        raise Mismatch("parameters beyond those of the common encoder layer")
    return EncoderParts(
        qkv=tuple(qkv),
        out=out,
        up=up,
        down=down,
        attention_norm=_norm(attention_norm),
        mlp_norm=_norm(mlp_norm),
        activation=activation,
    )


def encoder_layers(base: Any) -> nn.ModuleList | None:
    """The stack of layers with attention of their own, None when there isn't exactly one."""
    found = [
        module
        for module in base.modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(hasattr(layer, "attention") for layer in module)
    ]
    return found[0] if len(found) == 1 else None


def _at(owner: Any, path: str) -> Any:
    """What stands at a dotted path, None for nothing."""
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _norm(module: nn.LayerNorm) -> LayerNorm:
    weight, bias = module.weight, module.bias
    width = module.normalized_shape[0]
    return LayerNorm(
        torch.ones(width) if weight is None else weight.detach().float().clone(),
        torch.zeros(width) if bias is None else bias.detach().float().clone(),
        module.eps,
    )


def _replace(index: int, layer: Any, seen: Seen, backend: Backend) -> FusedEncoderLayer:
    """The proven replacement of one layer; Mismatch when there is none."""
    if seen.call is None:
        raise Mismatch("attention that isn't ours")
    parts, call = encoder_parts(layer), replace(seen.call, layer=index)
    matrices = parts.matrices()
    check_proof(index, lambda: _error(layer, call, matrices, seen, backend))
    fused = parts.layer(call, matrices)
    maps = ((matrices.qkv, parts.qkv), (matrices.out, (parts.out,)), (matrices.gate_up, (parts.up,)))
    fused.origins = origins(layer, (*maps, (matrices.down, (parts.down,))))
    return fused


def _error(layer: Any, call: AttentionCall, matrices: Matrices, seen: Seen, backend: Backend) -> float:
    """How far the fused layer is from its original, in float32 with noise: the worst token's largest share."""
    original = noisy_copy(layer, {})
    parts = encoder_parts(original)
    candidate = parts.layer(call, noisy_matrices(layer, matrices, parts))
    hidden = seen.hidden.float()
    half = hidden.shape[1] // 2
    context = ForwardContext(packed_layout([half, hidden.shape[1] - half]), None, backend)
    keywords = {**seen.keywords, "trunk": context}
    expected = original(hidden, **keywords)
    return float((largest(candidate(hidden, **keywords) - expected) / largest(expected)).max())


def _embeddings(module: Any) -> FusedEmbeddings | None:
    """The same as ``module`` by its parts, None when they aren't known."""
    found = [
        getattr(module, name, None) for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    ]
    norm = getattr(module, "LayerNorm", None)
    tables = [table for table in found if isinstance(table, nn.Embedding)]
    if found[0] is None or found[1] is None or type(norm) is not nn.LayerNorm or not covered(module, [*tables, norm]):
        return None
    words, places, *types = (table.weight for table in tables)
    return FusedEmbeddings(words, places, types[0] if types else None, _norm(norm))


def _walk(base: Any, layers: nn.ModuleList, output: Any, backend: Backend) -> bool:
    """Call embeddings and fused layers one after another, if all outputs stay the same, token types included."""
    if not isinstance(getattr(base, "embeddings", None), nn.Module):
        return False
    typed: dict[str, Any] = {}
    if (getattr(base.config, "type_vocab_size", None) or 0) > 1:
        tokens = output.last_hidden_state.shape[1]
        typed["token_type_ids"] = (torch.arange(tokens) >= tokens // 2).long()[None]

    def results() -> list[torch.Tensor]:
        both = [run(base, warm_up_context(base, backend), **given) for given in ({}, typed)]
        return [tensor for one in both for tensor in one.to_tuple()]

    def error(embeddings: Any) -> float:
        expected = [*output.to_tuple(), *results()[len(output) :]]
        base.forward = EncoderWalk(base, list(layers), type(output), embeddings)  # type: ignore[arg-type]
        return max(relative_error(mine, theirs) for mine, theirs in zip(results(), expected, strict=True))

    for embeddings in (_embeddings(base.embeddings), base.embeddings):
        if embeddings is not None and check_walk(base, output.last_hidden_state.dtype, partial(error, embeddings)):
            return True
        base.__dict__.pop("forward", None)
    return False
