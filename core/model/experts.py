"""Our experts function, registered in transformers' ``ExpertsInterface``.

All routed tokens of all mixture-of-experts layers pass through it, except in Llama 4, which runs all experts
on all tokens in its own module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .attention import NAME
from .expert_watch import TAP

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend

# Attributes of experts modules: the backend's operations of these names.
COUNTS, GROUPED_LINEAR = "trunk_expert_counts", "trunk_grouped_linear"
MATRICES = ("gate_up_proj", "up_proj", "down_proj")  # parameters of experts modules, or layers in place of them


def register() -> None:
    """Make ``experts_implementation=NAME`` known to transformers. May be called more than once."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, run_experts)


def bind_backend(model: torch.nn.Module, backend: Backend) -> None:
    """Let the experts of a model that was made with ``experts_implementation=NAME`` use this backend.

    transformers calls :func:`run_experts` without a context, so each module refers to the operations themselves.
    """
    for module in find_experts(model):
        setattr(module, COUNTS, backend.expert_counts)
        setattr(module, GROUPED_LINEAR, backend.grouped_linear)


def find_experts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of experts that call :func:`run_experts`, once they are bound."""
    return [one for one in model.modules() if hasattr(one, "has_gate") and hasattr(one, "num_experts")]


def is_bound(module: torch.nn.Module) -> bool:
    """Whether :func:`run_experts` runs the experts of this module."""
    return COUNTS in module.__dict__


def run_experts(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run each token through its ``k`` experts and add the weighted results.

    ``hidden`` is ``[T, hidden_size]``, ``top_k_index`` int64 ``[T, k]``, ``top_k_weights`` ``[T, k]``;
    returns ``[T, hidden_size]``. Token-expert pairs are sorted by expert, so that each expert's weights
    are read once, by one matrix product per projection. Observers are shown ``top_k_index``. ``module`` must have been
    bound by :func:`bind_backend`.
    """
    if hidden.is_meta:  # a pass on the meta device, for shapes: there are no indices to sort by
        return torch.empty_like(hidden)
    tap = module.__dict__.get(TAP)  # nn.Module.__getattr__ is slow for missing attributes
    if tap is not None and tap[0].active:
        tap[0].observe(tap[1], top_k_index)
    tokens, k = top_k_index.shape
    experts, order = top_k_index.reshape(-1).sort(stable=True)
    counts = module.__dict__[COUNTS](top_k_index, module.num_experts)
    ends = counts.cumsum(0, dtype=torch.int32)
    # With few rows, indexing by [] takes several times as long as these functions.
    results = _mlp(module, hidden.index_select(0, order // k), experts, ends)
    results = results * top_k_weights.reshape(-1).index_select(0, order).unsqueeze(-1)
    by_token = torch.empty_like(results).index_copy_(0, order, results)
    return by_token.view(tokens, k, -1).sum(1).to(hidden.dtype)


def _mlp(module: Any, x: torch.Tensor, experts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The experts' MLPs on rows ``x`` [N, hidden_size], sorted by expert; ``experts`` int64 [N] is that of each."""
    if module.has_gate:
        x = module._apply_gate(_project(module, "gate_up_proj", x, experts, ends))
    else:
        x = module.act_fn(_project(module, "up_proj", x, experts, ends))
    x = _project(module, "down_proj", x, experts, ends)
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    return x


def _project(module: Any, name: str, x: torch.Tensor, experts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows times their experts' matrices, ``[out, in]``, or ``[in, out]`` if the module stores them transposed."""
    weight = getattr(module, name)
    if isinstance(weight, torch.Tensor):
        x = module.__dict__[GROUPED_LINEAR](x, weight.transpose(1, 2) if module.is_transposed else weight, ends)
    else:
        x = weight(x, ends)
    return x + getattr(module, f"{name}_bias")[experts] if module.has_bias else x
