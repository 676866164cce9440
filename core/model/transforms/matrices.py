"""Finds the matrices that transforms may store: those of layers, whether they are fused or not, and of experts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from trunkline.core.model.attention import packed_layout
from trunkline.core.model.experts import MATRICES, is_bound
from trunkline.core.model.fusion.origins import (
    GroupedMatrices,
    LinearRows,
    Origins,
    TransposedLinear,
    module_origins,
)
from trunkline.core.model.refusal import reason_of
from trunkline.core.model.verification.samples import warm_up_ids
from trunkline.kernels.grouped_linear import GroupedLinear
from trunkline.kernels.linear import LinearLayer, PlainLinear

if TYPE_CHECKING:
    from trunkline.core.model.packed import PackedModel

log = logging.getLogger("trunkline.model")

# An expert's matrices in checkpoints that have a tensor for each expert, in the order of our rows; Mixtral's are the w.
_OF_EXPERTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",), ("w1",)),
    "down_proj": (("down_proj",), ("w2",)),
}
_MIXTRAL = ".mlp.", ".block_sparse_moe."  # the name of its MLP in transformers and in checkpoints


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix [N, K]. ``names``: the checkpoint's tensors that are merged in it, one below the other.

    ``linear`` multiplies by it now. ``replace(layer)`` lets another layer do that, from which tensors are then read.
    """

    names: list[str]
    linear: LinearLayer
    replace: Callable[[LinearLayer], None]


class ModelMatrices:
    """Iterates over the matrices of a model. A caller may replace each before it takes the next one."""

    def __init__(self, model: PackedModel, stored: Mapping[str, object]) -> None:
        """``stored``: the checkpoint's tensors by name."""
        self._model, self._stored = model, stored
        self._seen: WeakKeyDictionary[nn.Module, nn.Module | None] = WeakKeyDictionary()  # with their replacements
        self._unfused = model.backend.packs_modules or _are_called(model)

    def __iter__(self) -> Iterator[Matrix]:
        yield from self._below("", self._model.whole, in_layer=False)

    def _below(self, prefix: str, module: Any, *, in_layer: bool) -> Iterator[Matrix]:
        """The matrices below ``module``, whose name with a dot is ``prefix``. Layers are in lists of modules."""
        if module in self._seen:  # in some models, layers share modules
            return
        self._seen[module] = None
        # A layer for each expert has no place in a CUDA graph.
        if is_bound(module) and self._model.device.type == "cpu":
            for name in MATRICES:
                yield from self._of_experts(f"{prefix}{name}", module, name)
        in_layer = in_layer or isinstance(module, nn.ModuleList)
        for name in list(module._modules):
            child: Any = module._modules[name]
            if child is None or name.startswith("pooler") or isinstance(child, GroupedLinear):
                continue
            if rows := _merged(module, child):
                names = [self._in_checkpoint(prefix + tensor) for tensor in rows]
                yield Matrix(names, child, partial(_replace_fused, module, name))
            elif (known := self._seen.get(child)) is not None:
                setattr(module, name, known)
            elif in_layer and (linear := _plain(child)) is not None:
                if self._unfused and linear.out_features > self._model.info.num_experts:  # a router's stays as it is
                    names = [self._in_checkpoint(f"{prefix}{name}.weight")]
                    yield Matrix(names, linear, partial(self._replace_plain, module, name))
            else:
                yield from self._below(f"{prefix}{name}.", child, in_layer=in_layer)

    def _of_experts(self, tensor: str, module: Any, name: str) -> Iterator[Matrix]:
        """The matrices of the parameter ``name``, or of the layers in its place; ``tensor`` is its whole name."""
        layers = _layers(module, name)
        replaced = [False] * len(layers)

        def put(expert: int, layer: LinearLayer) -> None:
            layers[expert], replaced[expert] = layer, True

        for expert in range(len(layers)):
            yield Matrix(self._names_of_expert(tensor, name, expert), layers[expert], partial(put, expert))
        if any(replaced):
            if name in module._parameters:
                del module._parameters[name]
                # A view would keep the memory of all experts.
                kept = partial(torch.clone, memory_format=torch.contiguous_format)
                layers = [
                    layer if done else self._model.backend.linear(kept(layer.weight(slice(None))))
                    for layer, done in zip(layers, replaced, strict=True)
                ]
            grouped = GroupedLinear(layers)
            module.add_module(name, grouped)
            module.origins = {**getattr(module, "origins", {}), name: GroupedMatrices(grouped, module.is_transposed)}

    def _names_of_expert(self, tensor: str, name: str, expert: int) -> list[str]:
        """The checkpoint's tensors of one expert's matrix; the parameter's own name with a number if it has none."""
        prefix = tensor.removesuffix(name)
        for parts in _OF_EXPERTS.get(name, ()):
            for owner in (prefix, prefix.replace(*_MIXTRAL)):
                names = [self._in_checkpoint(f"{owner}{expert}.{part}.weight") for part in parts]
                if all(one in self._stored for one in names):
                    return names
        return [f"{self._in_checkpoint(tensor)}[{expert}]"]

    def _replace_plain(self, owner: Any, name: str, replacement: Any) -> None:
        """Replace a linear layer that isn't part of a fused layer."""
        old = getattr(owner, name)
        known = getattr(old, "origins", {}).get("weight")
        transposed = isinstance(known, TransposedLinear) if known else not isinstance(old, nn.Linear)
        replacement.origins = module_origins(replacement, transposed=transposed)
        self._seen[old] = replacement
        setattr(owner, name, replacement)

    def _in_checkpoint(self, name: str) -> str:
        """A tensor's name in the checkpoint, which may have or lack the prefix of the base model."""
        prefix = f"{self._model.whole.base_model_prefix}."
        known = (name, name.removeprefix(prefix), prefix + name)
        return next((one for one in known if one in self._stored), name)


def _merged(layer: Any, linear: Any) -> list[str]:
    """The tensors in a linear layer of a fused layer, in the order of its rows; [] for other modules."""
    origins: Origins = getattr(layer, "origins", {})
    rows = [(one.start, name) for name, one in origins.items() if isinstance(one, LinearRows) and one.linear is linear]
    return [name for _, name in sorted(rows)]


def _replace_fused(layer: Any, attribute: str, replacement: LinearLayer) -> None:
    """Replace a linear layer of a fused layer, also where its tensors are read by name."""
    linear = getattr(layer, attribute)
    for name, origin in layer.origins.items():
        if isinstance(origin, LinearRows) and origin.linear is linear:
            layer.origins[name] = replace(origin, linear=replacement)
    setattr(layer, attribute, replacement)


def _plain(module: Any) -> LinearLayer | None:
    """A linear layer that multiplies as ``module`` does; None for modules of another kind."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, LinearLayer):  # packed for the deterministic mode
        return module if "weight" in getattr(module, "origins", {}) else None
    if type(module) is nn.Linear:
        return PlainLinear(module.weight, module.bias)
    if type(module) is Conv1D:  # GPT-2's, whose weight is [K, N]
        return PlainLinear(module.weight.t().contiguous(), module.bias)
    return None


def _are_called(model: PackedModel) -> bool:
    """Whether layers that aren't fused call their linear layers, and don't read the weights of these modules."""
    from transformers.pytorch_utils import Conv1D

    layers = [module for module in model.whole.modules() if isinstance(module, nn.ModuleList)]
    found: dict[tuple[Any, str], Any] = {
        (owner, name): child
        for owner in {module for layer in layers for module in layer.modules()}
        for name, child in owner._modules.items()
        if type(child) in (nn.Linear, Conv1D)
    }
    if not found:
        return True
    ids = warm_up_ids(model, 2)
    try:
        for (owner, name), child in found.items():
            weight: Any = child.weight if type(child) is nn.Linear else child.weight.t()
            owner._modules[name] = PlainLinear(weight, child.bias)
        model.forward(ids, torch.arange(2, device=model.device), packed_layout([2]), None)
    except Exception as error:  # foreign code
        text = "%s: layers that aren't fused stay as they are, because a weight is read: %s"
        log.warning(text, model.info.architecture, reason_of(error))
        return False
    finally:
        for (owner, name), child in found.items():
            owner._modules[name] = child
    return True


def _layers(module: Any, name: str) -> list[LinearLayer]:
    """A layer for each expert's matrix; [] if the module has none of this name."""
    if (stack := module._modules.get(name)) is not None:
        return list(stack.layers)
    weight: torch.Tensor | None = module._parameters.get(name)
    if weight is None:
        return []
    return [PlainLinear(one) for one in (weight.transpose(1, 2) if module.is_transposed else weight)]
