"""Where each of a checkpoint's tensors went, so that it can be read again by its name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trunkline.kernels.linear import PackedLinear


@dataclass(frozen=True, slots=True)
class PackedRows:
    """The rows ``[start, stop)`` of a packed matrix are a tensor of the checkpoint."""

    packed: PackedLinear
    start: int
    stop: int

    def read(self, most: int) -> torch.Tensor:
        return self.packed.weight(slice(self.start, min(self.stop, self.start + most)))


Origins = dict[str, PackedRows | torch.Tensor]
"""By the name of a parameter inside its layer. Norms and biases, which may be stored changed, are copies."""


def origins(layer: nn.Module, maps: Iterable[tuple[PackedLinear | None, Iterable[nn.Linear]]]) -> Origins:
    """The parameters of a layer whose linear maps were merged, in this order, and packed."""
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    found: Origins = {
        name: parameter.detach().clone() for name, parameter in layer.named_parameters() if parameter.ndim == 1
    }
    for packed, linears in maps:
        start = 0
        for linear in linears:
            assert packed is not None
            found[names[id(linear.weight)]] = PackedRows(packed, start, start + linear.out_features)
            start += linear.out_features
    return found


def read(whole: Any, name: str, most: int) -> torch.Tensor | None:
    """The first ``most`` rows of a parameter or buffer by its name in transformers, None for an unknown one.

    With or without the prefix that classes with a head put before their base's names.
    """
    prefix = f"{whole.base_model_prefix}."
    for known in (name, name.removeprefix(prefix), prefix + name):
        found = _find(whole, known)
        if isinstance(found, PackedRows):
            return found.read(most)
        if found is not None:
            return found[:most] if found.ndim else found
    return None


def _find(whole: nn.Module, name: str) -> PackedRows | torch.Tensor | None:
    owner: Any = whole
    steps, fused = name.split("."), False
    for at, step in enumerate(steps):
        if (inside := getattr(owner, "origins", None)) is not None:
            known: Origins = inside
            if (found := known.get(".".join(steps[at:]))) is not None:
                return found
            fused = True  # its own packed matrices aren't the checkpoint's
        if isinstance(owner, PackedLinear):
            if fused or steps[at:] not in (["weight"], ["bias"]):
                return None
            return owner.bias if step == "bias" else PackedRows(owner, 0, owner.out_features)
        tensors = {**owner._parameters, **owner._buffers}
        if at + 1 == len(steps):
            return tensors.get(step)
        owner = owner._modules.get(step)
        if owner is None:
            return None
    return None
