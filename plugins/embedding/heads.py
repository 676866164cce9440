"""The modules after pooling in a sentence-transformers folder, Dense, LayerNorm and Normalize, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.nn import functional

from trunkline.core.errors import ModelError

from .recipe import Module, activation_name

Transform = Callable[[Tensor], Tensor]
"""Vectors ``[R, in]`` -> ``[R, out]``, float32."""


def build(modules: Sequence[Module], width: int, device: torch.device) -> Transform:
    """A function that applies all modules, to vectors of length ``width``. ModelError for missing or wrong weights."""
    transforms: list[Transform] = []
    for module in modules:
        if module.kind == "Dense":
            transforms.append(_dense(module, width, device))
        elif module.kind == "LayerNorm":
            transforms.append(_layer_norm(module, width, device))
        else:
            transforms.append(normalize)
        width = module.width

    def apply(vectors: Tensor) -> Tensor:
        for transform in transforms:
            vectors = transform(vectors)
        return vectors

    return apply


def normalize(vectors: Tensor) -> Tensor:
    """Scale each vector to length 1; zero vectors are unchanged."""
    return functional.normalize(vectors, p=2, dim=-1)


def _dense(module: Module, width: int, device: torch.device) -> Transform:
    bias = module.config.get("bias", True) is not False
    residual = module.config.get("use_residual") is True
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": (module.width, width)}
    if bias:
        shapes["linear.bias"] = (module.width,)
    if residual and module.width != width:
        shapes["residual.weight"] = (module.width, width)
    weights = _load(Path(module.folder), shapes, device)
    activation: Transform = getattr(torch.nn, activation_name(module.config))()

    def apply(vectors: Tensor) -> Tensor:
        out = activation(functional.linear(vectors, weights["linear.weight"], weights.get("linear.bias")))
        if not residual:
            return out
        projection = weights.get("residual.weight")
        return out + (vectors if projection is None else functional.linear(vectors, projection))

    return apply


def _layer_norm(module: Module, width: int, device: torch.device) -> Transform:
    weights = _load(Path(module.folder), {"norm.weight": (width,), "norm.bias": (width,)}, device)
    return lambda vectors: functional.layer_norm(vectors, (width,), weights["norm.weight"], weights["norm.bias"])


def _load(folder: Path, shapes: dict[str, tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    try:
        stored = load(path.read_bytes())  # not memory-mapped: if a mapped file is truncated, the process is killed
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error
    for name, shape in shapes.items():
        found = tuple(stored[name].shape) if name in stored else None
        if found != shape:
            raise ModelError(f"{path}: {name} must be {list(shape)}, it is {'missing' if found is None else found}.")
    return {name: stored[name].to(device, torch.float32) for name in shapes}
