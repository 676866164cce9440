"""Packs the weights of modules that aren't ours, for the deterministic mode, so that it has one copy of them.

These are the linear layers of layers that aren't fused, and mixtures of experts. A parameter that a class multiplies
itself, such as the matrix of a router, stays as it is, and :func:`.torch_calls.packed` keeps a packed copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from trunkline.core.model.experts import MATRICES, is_bound
from trunkline.core.model.fusion.origins import GroupedMatrices, LinearRows, Origins, TransposedLinear

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend


def pack_weights(module: Any, backend: Backend) -> None:
    """Replace the linear layers and the experts' matrices below ``module``, in place, by packed ones of ``backend``.

    Does nothing unless the backend is deterministic. Poolers are left out: heads have float32 copies of them. Each
    original's memory is freed when it is replaced. Parameters can still be read by their names (:func:`.origins.read`).
    """
    from transformers.pytorch_utils import Conv1D

    if backend.pack_experts is None:
        return
    if is_bound(module):
        _pack_experts(module, backend)
    for name, child in module.named_children():
        if type(child) in (nn.Linear, Conv1D):
            setattr(module, name, _packed(child, backend))
        elif not name.startswith("pooler"):
            pack_weights(child, backend)


def _packed(module: Any, backend: Backend) -> nn.Module:
    """The replacement of a linear layer with a weight [N, K], or of GPT-2's, whose weight is [K, N]."""
    usual = isinstance(module, nn.Linear)
    linear: Any = backend.linear(module.weight if usual else module.weight.t().contiguous(), module.bias)
    origins: Origins = {"weight": LinearRows(linear, 0, linear.out_features) if usual else TransposedLinear(linear)}
    linear.origins = origins if linear.bias is None else origins | {"bias": linear.bias}
    packed: nn.Module = linear
    return packed


def _pack_experts(module: Any, backend: Backend) -> None:
    """Replace the parameters of an experts module that have a matrix for each expert."""
    assert backend.pack_experts is not None
    origins: Origins = {}
    for name in MATRICES:
        weight = module._parameters.pop(name, None)
        if weight is not None:
            layer = backend.pack_experts(weight.transpose(1, 2) if module.is_transposed else weight)
            module.add_module(name, layer)
            origins[name] = GroupedMatrices(layer, module.is_transposed)
    if origins:  # there are none if they have been packed before
        module.origins = origins
