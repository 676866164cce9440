"""Conditions under which warm-up passes reveal differences that would otherwise be hidden.

At load, a model is compared with transformers' own on short texts, in its own dtype. A difference would be missed
if it appears only in texts longer than an attention window, if it is smaller than rounding, or if it
depends on earlier requests.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from trunkline.core.errors import ModelError
from trunkline.core.model.architecture import options
from trunkline.core.model.packed import PackedModel
from trunkline.core.model.refusal import reason_of

log = logging.getLogger("trunkline.model")

SHORT_WINDOW = 4  # tokens; warm-up sequences are several times as long
# Parts of the names of config settings that bound attention, in tokens.
WINDOW_SETTINGS = re.compile(r"window|chunk|block_size|index_topk|topk_blocks|floor|local_attention")
LOW_PRECISION = (torch.bfloat16, torch.float16)
SMALL_EMBEDDING = 1 << 22  # numbers in an embedding


@contextmanager
def strict(model: PackedModel) -> Iterator[PackedModel]:
    """All conditions of this module together, for the model that it yields. ModelError if a pass inside changes it."""
    with in_float32(model) as wide, short_windows(wide), unchanged(wide):
        yield wide


@contextmanager
def in_float32(model: PackedModel) -> Iterator[PackedModel]:
    """Every module computes in float32, with its own weights; yields the model with this dtype.

    A module's weights are converted only while it runs, so the extra memory is that of one module. Vectors
    of large embeddings are converted after the look-up. Small embeddings are converted throughout, because
    other modules may use their weights.
    """
    with ExitStack() as stack:
        for module in model.whole.modules():
            stored = [tensor for tensor in _tensors(module) if tensor.dtype in LOW_PRECISION]
            if not isinstance(module, nn.Embedding):
                handles = _hooks(module, stored)
            elif module.weight.numel() > SMALL_EMBEDDING:
                handles = [module.register_forward_hook(lambda _, __, vectors: vectors.float())]
            else:
                handles = []
                stack.callback(_restore, stored, [tensor.data for tensor in stored])
                _widen(stored)
            for handle in handles:
                stack.callback(handle.remove)
        yield replace(model, dtype=torch.float32)


def _hooks(module: nn.Module, stored: list[torch.Tensor]) -> list[Any]:
    """Register hooks that convert a module's own tensors to float32 while it runs; [] if there are none."""
    if not stored:
        return []
    narrow = [tensor.data for tensor in stored]
    before = module.register_forward_pre_hook(lambda *_: _widen(stored))
    return [before, module.register_forward_hook(lambda *_: _restore(stored, narrow), always_call=True)]


def _widen(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.data = tensor.data.float()


def _restore(tensors: list[torch.Tensor], data: list[torch.Tensor]) -> None:
    for tensor, one in zip(tensors, data, strict=True):
        tensor.data = one


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


@contextmanager
def short_windows(model: PackedModel) -> Iterator[None]:
    """Set attention windows and chunks to SHORT_WINDOW tokens, so that warm-up sequences are longer.

    Settings of at least the context length stay, since no text exceeds them. Values that modules derived from
    a setting when they were constructed are taken from a model on the meta device.
    """
    whole, limit = model.whole, model.info.context_length
    meta = _meta_model(model) if any(_window_settings(config, limit) for config in _configs(whole.config)) else None
    with ExitStack() as stack:
        if meta is not None:
            for mine, theirs in zip(whole.modules(), meta.modules(), strict=True):
                derived = {name: value for name, value in vars(theirs).items() if WINDOW_SETTINGS.search(name)}
                _replace(stack, mine, {name: value for name, value in derived.items() if type(value) is int})
                for config in _configs(vars(mine).get("config")):
                    _replace(stack, config, dict.fromkeys(_window_settings(config, limit), SHORT_WINDOW))
        yield


def _meta_model(model: PackedModel) -> Any:
    """A model of the same class on the meta device, with short windows; None if its class refuses them."""
    cls, short = type(model.whole), copy.deepcopy(model.whole.config)
    for config in _configs(short):
        for name in _window_settings(config, model.info.context_length):
            setattr(config, name, SHORT_WINDOW)
    try:
        with torch.device("meta"):
            return cls._from_config(short, dtype=model.dtype, **options(cls, model.info))
    except Exception as error:  # for example, because settings must be consistent
        log.info("%s is verified with its own windows: %s", model.info.architecture, reason_of(error))
        return None


def _replace(stack: ExitStack, owner: Any, values: dict[str, int]) -> None:
    """Set attributes; the stack restores them."""
    for name, value in values.items():
        stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def _window_settings(config: Any, limit: int) -> list[str]:
    """Names of settings that bound attention, in tokens, and that a text of ``limit`` tokens can exceed."""
    values = vars(config).items()
    return [
        name
        for name, value in values
        if type(value) is int and SHORT_WINDOW < value < limit and WINDOW_SETTINGS.search(name)
    ]


def _configs(config: Any) -> list[Any]:
    """A transformers config and the configs nested in it; [] for anything else."""
    from transformers import PreTrainedConfig

    if not isinstance(config, PreTrainedConfig):
        return []
    return [config, *(inner for value in vars(config).values() for inner in _configs(value))]


@contextmanager
def unchanged(model: PackedModel) -> Iterator[None]:
    """ModelError if a pass inside changes the model, since later results would then depend on earlier requests."""
    before = _state(model.backbone)
    yield
    after = _state(model.backbone)
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        raise ModelError(
            f"{model.info.architecture} can't be served: a pass changes the model itself ({changed[0]} from "
            f"{before.get(changed[0])} to {after.get(changed[0])}), so results would depend on earlier requests."
        )


def _state(whole: nn.Module) -> dict[str, Any]:
    """The class of every module, and its attributes that are numbers or strings, by module and attribute name."""
    return {
        f"{name}.{key}": value
        for name, module in whole.named_modules()
        for key, value in (("class", type(module).__name__), *vars(module).items())
        if isinstance(value, bool | int | float | str)
    }
