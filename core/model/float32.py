"""Heads that compute in float32, whatever the model's dtype.

Near 8, neighbouring bfloat16 numbers are 1/16 apart. Documents that differ would get the same score, or
the wrong order.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trunkline.core.model.sources.tensor_file import StoredTensor

from .architecture import backbone_of, output_matrix

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend


def float32_view(whole: Any, stored: Mapping[str, torch.Tensor | StoredTensor], backend: Backend) -> Any:
    """A view of a transformers model, with float32 copies of the modules that come after its layers.

    These are poolers, and the modules beside the backbone except the output matrix of logits. All other
    modules are shared with the model. ``stored`` are the checkpoint's tensors by name; copies take their
    values from it, unrounded. Linear layers become those of the backend: unlike torch's, the result of a packed one
    for a row doesn't depend on the other rows.
    """
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    backbone, logits = backbone_of(whole), output_matrix(whole)

    def widened(module: nn.Module) -> nn.Module:
        clone = copy.deepcopy(module).float()
        for mine, theirs in zip(clone.parameters(), module.parameters(), strict=True):
            exact = stored.get(names[id(theirs)])
            if exact is not None and exact.shape == mine.shape:
                mine.data.copy_(exact.to(mine.device, torch.float32))
        return _with_linears(clone, backend)

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


def _with_linears(module: nn.Module, backend: Backend) -> nn.Module:
    """Replace a module's linear layers by the backend's, in place; returns it, or its replacement if it is one."""
    if type(module) is nn.Linear:
        return backend.linear(module.weight.detach(), module.bias)
    for name, child in module.named_children():
        setattr(module, name, _with_linears(child, backend))
    return module


def _with_children(module: Any, children: Mapping[str, nn.Module]) -> Any:
    """A shallow copy of a module, which shares its parameters, with some children replaced."""
    clone = copy.copy(module)
    clone._modules = {**module._modules, **children}
    return clone
