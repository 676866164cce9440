"""Finds the modules of a transformers decoder layer that :class:`.FusedLayer` can replace.

Modules are found by attribute name. Norms and activations are then identified by what they compute, and
every parameter of the layer must belong to one of the modules that were found.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trunkline.kernels.activation import ACTIVATIONS

from .decoder_layer import Biases, Matrices, Norm, Norms
from .origins import Origins, origins

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend

MATCH_TOLERANCE = 1e-5


class Mismatch(Exception):
    """A layer can't be fused; the message says why."""


@dataclass(frozen=True, slots=True)
class DecoderModules:
    """The modules of a decoder layer; linear layers with the same input are in one tuple, in merging order."""

    index: int
    qkv: tuple[nn.Linear, ...]
    out: nn.Linear
    gate_up: tuple[nn.Linear, ...]  # () if ``other_mlp`` is kept
    down: nn.Linear | None
    activation: str
    other_mlp: nn.Module | None
    norms: Norms

    def matrices(self, backend: Backend) -> Matrices:
        """Merge the linear layers. The result doesn't refer to their modules, so the layer can be freed."""
        linear, biases = backend.linear, self.biases()
        return Matrices(
            qkv=linear(merged(self.qkv), biases.qkv),
            out=linear(self.out.weight, biases.out),
            gate_up=linear(merged(self.gate_up), biases.gate_up) if self.gate_up else None,
            down=linear(self.down.weight, biases.down) if self.down is not None else None,
        )

    def origins(self, layer: nn.Module, matrices: Matrices) -> Origins:
        """Where the parameters of ``layer`` are in ``matrices``."""
        down = () if self.down is None else (self.down,)
        linears = ((matrices.qkv, self.qkv), (matrices.out, (self.out,)), (matrices.gate_up, self.gate_up))
        return origins(layer, (*linears, (matrices.down, down)))

    def biases(self) -> Biases:
        return Biases(
            qkv=merged_bias(self.qkv),
            out=merged_bias((self.out,)),
            gate_up=merged_bias(self.gate_up),
            down=merged_bias(() if self.down is None else (self.down,)),
        )


def decoder_modules(layer: Any, backend: Backend) -> DecoderModules:
    """The modules of a decoder layer; Mismatch if one is missing, or none of the backend's operations computes it."""
    attention, mlp = layer.self_attn, getattr(layer, "mlp", None)
    known: list[nn.Module] = []
    qkv = _linears(attention, ("qkv_proj",), known) or _linears(attention, ("q_proj", "k_proj", "v_proj"), known)
    out = _linears(attention, ("o_proj",), known)
    if not qkv or not out or mlp is None:
        raise Mismatch("another kind of attention or MLP")
    mlp_known: list[nn.Module] = []
    gate_up = _linears(mlp, ("gate_up_proj",), mlp_known) or _linears(mlp, ("gate_proj", "up_proj"), mlp_known)
    down = _linears(mlp, ("down_proj",), mlp_known)
    function = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    activation = activation_name(function, backend, out[0].weight.device)
    gated = bool(gate_up and down and activation) and covered(mlp, mlp_known)
    norms = _norms(layer, attention, known, backend)
    if not covered(layer, [*known, mlp]):
        raise Mismatch("parameters beyond those of the common decoder layer")
    return DecoderModules(
        index=int(attention.layer_idx),
        qkv=qkv,
        out=out[0],
        gate_up=gate_up if gated else (),
        down=down[0] if gated else None,
        activation=activation,
        other_mlp=None if gated else mlp,
        norms=norms,
    )


def norm_of(module: nn.Module, backend: Backend) -> Norm | None:
    """The RMS norm of the backend that computes the same as a module, in float32; None if there is none."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.ndim != 1 or not isinstance(eps, float) or len(list(module.parameters())) != 1:
        return None
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    expected = copy.deepcopy(module).float()(x)
    for factor in (weight.float().clone(), 1.0 + weight.float()):
        norm = Norm(factor, eps, backend.rms_norm)
        if torch.allclose(norm(x), expected, MATCH_TOLERANCE, MATCH_TOLERANCE):
            return norm
    return None


def _norms(layer: Any, attention: Any, known: list[nn.Module], backend: Backend) -> Norms:
    def find(owner: Any, name: str) -> Norm | None:
        module: Any = getattr(owner, name, None)
        norm = norm_of(module, backend) if isinstance(module, nn.Module) else None
        if norm is not None:
            known.append(module)
        return norm

    first, second = find(layer, "input_layernorm"), find(layer, "post_attention_layernorm")
    before_mlp, after_mlp = find(layer, "pre_feedforward_layernorm"), find(layer, "post_feedforward_layernorm")
    queries, keys = find(attention, "q_norm"), find(attention, "k_norm")
    if first is None or second is None or (before_mlp is None) != (after_mlp is None):
        raise Mismatch("norms that aren't RMS norms before attention and MLP")
    if (queries is None) != (keys is None) or (queries and keys and queries.eps != keys.eps):
        raise Mismatch("norms of queries and keys that differ in kind")
    if before_mlp is None:
        return Norms(attention=first, mlp=second, queries=queries, keys=keys)
    return Norms(
        attention=first, after_attention=second, mlp=before_mlp, after_mlp=after_mlp, queries=queries, keys=keys
    )


def _linears(owner: Any, names: tuple[str, ...], known: list[nn.Module]) -> tuple[nn.Linear, ...]:
    """The ``nn.Linear`` modules with these names, added to ``known``; () if one is missing or of another class."""
    found: tuple[Any, ...] = tuple(getattr(owner, name, None) for name in names)
    if any(type(module) is not nn.Linear for module in found):
        return ()
    known.extend(found)
    return found


def activation_name(function: Any, backend: Backend, device: torch.device) -> str:
    """Which of :data:`ACTIVATIONS` a function computes; "" for none of them. ``device``: the backend's."""
    if function is None:
        return ""
    x = torch.linspace(-6, 6, 97, device=device)[None]
    for name in ACTIVATIONS:
        if torch.allclose(function(x), backend.activate(x, name), MATCH_TOLERANCE, MATCH_TOLERANCE):
            return name
    return ""


def covered(owner: nn.Module, known: list[nn.Module]) -> bool:
    """Whether every parameter of ``owner`` belongs to one of the known modules."""
    ours = {id(parameter) for module in known for parameter in module.parameters()}
    return all(id(parameter) in ours for parameter in owner.parameters())


def merged(linears: tuple[nn.Linear, ...]) -> torch.Tensor:
    """The weights of linear layers with the same input as one, [sum of outputs, inputs]."""
    return linears[0].weight if len(linears) == 1 else torch.cat([linear.weight for linear in linears])


def merged_bias(linears: tuple[nn.Linear, ...]) -> torch.Tensor | None:
    """The biases of linear layers as one, zeros where one has none; None if none has one."""
    if all(linear.bias is None for linear in linears):
        return None
    biases: list[torch.Tensor] = [
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears
    ]
    return torch.cat(biases)
