"""Heads in float32, whatever the dtype of the model below them.

A score near 8 has steps of 1/16 in bfloat16: documents that differ would get the same score, or change places.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trunkline.core.model.sources.tensor_file import StoredTensor
from trunkline.kernels.linear import PackedLinear

from .architecture import backbone_of, output_matrix


def float32_view(whole: Any, stored: Mapping[str, torch.Tensor | StoredTensor], *, pack: bool = False) -> Any:
    """A view of a transformers model with float32 copies of what comes after its layers.

    Those are the modules beside the backbone, except the matrix that makes logits, and poolers. All others are the
    model's own. ``stored`` are the checkpoint's tensors by name: copies have their exact values. With ``pack`` their
    linear layers are our own, which give a row the same bits whatever rows are beside it; torch's don't.
    """
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    backbone, logits = backbone_of(whole), output_matrix(whole)

    def widened(module: nn.Module) -> nn.Module:
        twin = copy.deepcopy(module).float()
        for mine, theirs in zip(twin.parameters(), module.parameters(), strict=True):
            exact = stored.get(names[id(theirs)])
            if exact is not None and exact.shape == mine.shape:
                mine.data.copy_(exact.to(mine.device, torch.float32))
        return _packed(twin) if pack else twin

    if backbone is whole:
        return whole
    poolers = {name: widened(child) for name, child in backbone.named_children() if name.startswith("pooler")}
    view = _with_children(whole, {})
    for name, child in whole.named_children():
        if child is backbone:
            view._modules[name] = _with_children(backbone, poolers)
        elif child is not logits:
            view._modules[name] = widened(child)
    return view


def _packed(module: nn.Module) -> nn.Module:
    """The module, changed in place, or what replaces it if it is a linear layer itself."""
    if type(module) is nn.Linear:
        return PackedLinear(module.weight.detach(), module.bias)
    for name, child in module.named_children():
        setattr(module, name, _packed(child))
    return module


def _with_children(module: Any, children: Mapping[str, nn.Module]) -> Any:
    """The same module, not a copy of its parameters, with some children replaced."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin
