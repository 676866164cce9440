"""Our experts function against transformers' loop over experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trunkline.core.model.experts import bind_backend, run_experts
from trunkline.core.model.loaded import LoadedModel
from trunkline.kernels.backend import choose

MIXTURES = ["gpt-oss", "mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v2", "deepseek-v3"]


def experts_of(whole: Any) -> Any:
    """The first experts module of a model."""
    return next(module for module in whole.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "act_fn"))


@pytest.mark.parametrize("name", [name for name in MIXTURES if name != "gpt-oss"])
@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("backend", ["cpu", "torch_native"])
def test_like_transformers(name: str, tokens: int, backend: str, reference: Callable[[str], Any]) -> None:
    module = experts_of(reference(name))
    bind_backend(module, choose(backend, "cpu"))
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 128, generator=generator)
    index = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(tokens)])
    weights = torch.rand(tokens, 3, generator=generator)
    with torch.inference_mode():
        assert (run_experts(module, hidden, index, weights) - module(hidden, index, weights)).abs().max() < 1e-5


@pytest.mark.parametrize("name", MIXTURES)
def test_every_layer_comes_through_here(
    name: str, load: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations.moe import ExpertsInterface

    from trunkline.core.model.attention import NAME, packed_layout

    model = load(name)
    seen: list[torch.Size] = []

    def count(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append(index.shape)
        return run_experts(module, hidden, index, weights)

    ExpertsInterface.register(NAME, count)
    try:
        ids = torch.arange(9)
        model.forward(ids, ids, packed_layout([9]), None)
    finally:
        ExpertsInterface.register(NAME, run_experts)
    dense = model.info.config.get("first_k_dense_replace", 0)
    assert seen == [torch.Size((9, 2))] * (2 - dense)
