"""Packs the weights of modules that aren't ours into layers of the backend: mixtures of experts, and linear layers.

Experts are packed where the backend has layers for them (on a CPU, they multiply few rows several times as fast).
Linear layers of layers that aren't fused are packed in the deterministic mode only, so that there is one copy of
them: a class that reads the weight of such a module, in place of calling it, can't be served then. A parameter that a
class multiplies itself, such as the matrix of a router, stays as it is; in that mode :func:`.torch_calls.packed` keeps
a packed copy.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trunkline.core.model.experts import MATRICES, is_bound

from .origins import GroupedMatrices, module_origins
from .warm_up import relative_error, tolerance

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend

log = logging.getLogger("trunkline.model")


def pack_weights(module: Any, backend: Backend) -> None:
    """Replace the experts' matrices below ``module``, in place, by layers of ``backend``, and in the deterministic mode
    the linear layers.

    Poolers are left out: heads have float32 copies of them. Each original's memory is freed when it is replaced.
    Parameters can still be read by their names (:func:`.origins.read`).
    """
    from transformers.pytorch_utils import Conv1D

    if backend.pack_experts is None:
        return
    if is_bound(module):
        _pack_experts(module, backend)
    for name, child in module.named_children():
        if type(child) in (nn.Linear, Conv1D):
            if backend.packs_modules:
                setattr(module, name, _packed(child, backend))
        elif not name.startswith("pooler"):
            pack_weights(child, backend)


def _packed(module: Any, backend: Backend) -> nn.Module:
    """The replacement of a linear layer with a weight [N, K], or of GPT-2's, whose weight is [K, N]."""
    usual = isinstance(module, nn.Linear)
    linear: Any = backend.linear(module.weight if usual else module.weight.t().contiguous(), module.bias)
    linear.origins = module_origins(linear, transposed=not usual)
    packed: nn.Module = linear
    return packed


@torch.inference_mode()
def _pack_experts(module: Any, backend: Backend) -> None:
    """Replace the parameters of an experts module that have a matrix for each expert, unless results differ."""
    assert backend.pack_experts is not None
    for name in MATRICES:
        weight = module._parameters.get(name)
        if weight is None:
            continue
        matrices = weight.transpose(1, 2) if module.is_transposed else weight
        layer = backend.pack_experts(matrices)
        rows = torch.randn(len(matrices), matrices.shape[2], generator=torch.Generator().manual_seed(5)).to(weight)
        ends = torch.arange(1, len(matrices) + 1, dtype=torch.int32)  # one row for each expert
        found, expected = layer(rows, ends), backend.grouped_linear(rows, matrices, ends)
        error = 0.0 if torch.equal(found, expected) else relative_error(found, expected)
        if not error <= tolerance(weight.dtype):
            log.warning("the experts' %s isn't replaced, its relative error would be %.1e", name, error)
            continue
        del module._parameters[name]
        module.add_module(name, layer)
        module.origins = {**getattr(module, "origins", {}), name: GroupedMatrices(layer, module.is_transposed)}
