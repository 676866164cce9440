"""Where the tensors of a checkpoint are in packed layers, so that they can still be read by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trunkline.kernels.grouped_linear import GroupedLinear
from trunkline.kernels.linear import LinearLayer


@dataclass(frozen=True, slots=True)
class LinearRows:
    """A tensor of the checkpoint that is the rows ``[start, stop)`` of a linear layer's weight."""

    linear: LinearLayer
    start: int
    stop: int

    def read(self, most: int) -> torch.Tensor:
        """At most the first ``most`` rows of the tensor."""
        return self.linear.weight(slice(self.start, min(self.stop, self.start + most)))


@dataclass(frozen=True, slots=True)
class TransposedLinear:
    """A tensor [K, N] of the checkpoint that is the transposed weight of a linear layer."""

    linear: LinearLayer

    def read(self, most: int) -> torch.Tensor:
        """At most the first ``most`` rows of the tensor."""
        return self.linear.weight(slice(0, self.linear.out_features)).t()[:most]


@dataclass(frozen=True, slots=True)
class GroupedMatrices:
    """A tensor [E, N, K] of the checkpoint, or [E, K, N] if ``transposed``: the weights of E experts."""

    linear: GroupedLinear
    transposed: bool

    def read(self, most: int) -> torch.Tensor:
        """At most the first ``most`` matrices of the tensor."""
        weights = self.linear.weight(most)
        return weights.transpose(1, 2) if self.transposed else weights


Packed = LinearRows | TransposedLinear | GroupedMatrices
Origins = dict[str, Packed | torch.Tensor]
"""By the name of a parameter in its layer. Norms and biases are copies, since fused layers may store them changed."""


def origins(layer: nn.Module, linears: Iterable[tuple[LinearLayer | None, Iterable[nn.Linear]]]) -> Origins:
    """The origins of a layer's parameters.

    ``linears``: the backend's linear layers, each with the originals that were merged into it, in this order.
    """
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    found: Origins = {
        name: parameter.detach().clone() for name, parameter in layer.named_parameters() if parameter.ndim == 1
    }
    for linear, merged in linears:
        start = 0
        for original in merged:
            assert linear is not None
            found[names[id(original.weight)]] = LinearRows(linear, start, start + original.out_features)
            start += original.out_features
    return found


def module_origins(linear: LinearLayer, *, transposed: bool) -> Origins:
    """The origins of a module that a linear layer replaces; ``transposed``: its weight is [K, N]."""
    weight = TransposedLinear(linear) if transposed else LinearRows(linear, 0, linear.out_features)
    return {"weight": weight} if linear.bias is None else {"weight": weight, "bias": linear.bias}


def read(whole: Any, name: str, most: int) -> torch.Tensor | None:
    """The first ``most`` rows of a parameter or buffer, by its name in transformers; None if it is unknown.

    The name may have or lack the prefix of the base model, which classes with a head put before its names.
    """
    prefix = f"{whole.base_model_prefix}."
    for known in (name, name.removeprefix(prefix), prefix + name):
        found = _find(whole, known)
        if isinstance(found, Packed):
            return found.read(most)
        if found is not None:
            return found[:most] if found.ndim else found
    return None


def _find(whole: nn.Module, name: str) -> Packed | torch.Tensor | None:
    owner: Any = whole
    steps, fused = name.split("."), False
    for at, step in enumerate(steps):
        if (inside := getattr(owner, "origins", None)) is not None:
            known: Origins = inside
            if (found := known.get(".".join(steps[at:]))) is not None:
                return found
            fused = True  # linear layers inside a fused layer aren't tensors of the checkpoint
        if isinstance(owner, LinearLayer):
            if fused or steps[at:] not in (["weight"], ["bias"]):
                return None
            return owner.bias if step == "bias" else LinearRows(owner, 0, owner.out_features)
        tensors = {**owner._parameters, **owner._buffers}
        if at + 1 == len(steps):
            return tensors.get(step)
        owner = owner._modules.get(step)
        if owner is None:
            return None
    return None
