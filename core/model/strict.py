"""Conditions under which warm-up passes show differences that they would otherwise hide.

A model is compared with transformers on a few tokens, in its own dtype. What differs only on longer texts, by less
than rounding, or after other requests, would go unnoticed.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from trunkline.core.errors import ModelError

from .architecture import options
from .loaded import LoadedModel
from .refusal import reason_of

log = logging.getLogger("trunkline.model")

NARROW = 4  # tokens; warm-up sequences are several times as long
LENGTHS = re.compile(r"window|chunk|block_size|index_topk|topk_blocks|floor|local_attention")  # in names of settings
NARROWER = (torch.bfloat16, torch.float16)
SMALL = 1 << 22  # numbers in an embedding


@contextmanager
def strict(model: LoadedModel) -> Iterator[None]:
    """All conditions of this module together. ModelError when the passes changed the model."""
    with in_float32(model), narrowed(model), unchanged(model):
        yield


@contextmanager
def in_float32(model: LoadedModel) -> Iterator[None]:
    """Every module computes in float32 with its own weights, which take twice the memory for one module at a time.

    Large embeddings are looked up as they are stored and widened afterwards; other modules may use small ones.
    """
    dtype, model.dtype = model.dtype, torch.float32
    with ExitStack() as stack:
        stack.callback(setattr, model, "dtype", dtype)
        for module in model.whole.modules():
            stored = [tensor for tensor in _tensors(module) if tensor.dtype in NARROWER]
            if not isinstance(module, nn.Embedding):
                handles = _hooks(module, stored)
            elif module.weight.numel() > SMALL:
                handles = [module.register_forward_hook(lambda _, __, vectors: vectors.float())]
            else:
                handles = []
                stack.callback(_restore, stored, [tensor.data for tensor in stored])
                _widen(stored)
            for handle in handles:
                stack.callback(handle.remove)
        yield


def _hooks(module: nn.Module, stored: list[torch.Tensor]) -> list[Any]:
    """Hooks that make the module's own tensors float32 while it runs; none when it has none."""
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
def narrowed(model: LoadedModel) -> Iterator[None]:
    """Windows, chunks and the like are NARROW tokens wide, so that warm-up sequences are longer than they are.

    Settings of at least the context length stay: no text is longer. What modules derive from a setting when they
    are made is taken from a twin without weights.
    """
    whole, limit = model.whole, model.info.context_length
    twin = _twin(model) if any(_lengths(config, limit) for config in _configs(whole.config)) else None
    with ExitStack() as stack:
        if twin is not None:
            for mine, theirs in zip(whole.modules(), twin.modules(), strict=True):
                derived = {name: value for name, value in vars(theirs).items() if LENGTHS.search(name)}
                _replace(stack, mine, {name: value for name, value in derived.items() if type(value) is int})
                for config in _configs(vars(mine).get("config")):
                    _replace(stack, config, dict.fromkeys(_lengths(config, limit), NARROW))
        yield


def _twin(model: LoadedModel) -> Any:
    """The same class of a config with narrow windows, on the meta device; None when the class refuses them."""
    cls, shorter = type(model.whole), copy.deepcopy(model.whole.config)
    for config in _configs(shorter):
        for name in _lengths(config, model.info.context_length):
            setattr(config, name, NARROW)
    try:
        with torch.device("meta"):
            return cls._from_config(shorter, dtype=model.dtype, **options(cls, model.info))
    except Exception as error:  # settings may have to fit others
        log.info("%s is checked with its own windows: %s", model.info.architecture, reason_of(error))
        return None


def _replace(stack: ExitStack, owner: Any, values: dict[str, int]) -> None:
    """Set attributes until the stack is left."""
    for name, value in values.items():
        stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def _lengths(config: Any, limit: int) -> list[str]:
    """Settings that bound how far attention looks, in tokens, and that a text of ``limit`` tokens can exceed."""
    values = vars(config).items()
    return [name for name, value in values if type(value) is int and NARROW < value < limit and LENGTHS.search(name)]


def _configs(config: Any) -> list[Any]:
    """A transformers config and those inside it; [] for anything else."""
    from transformers import PreTrainedConfig

    if not isinstance(config, PreTrainedConfig):
        return []
    return [config, *(inner for value in vars(config).values() for inner in _configs(value))]


@contextmanager
def unchanged(model: LoadedModel) -> Iterator[None]:
    """ModelError when a pass changes the model: what it computes next would depend on what it has computed before."""
    before = _state(model.backbone)
    yield
    after = _state(model.backbone)
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        raise ModelError(
            f"{model.info.architecture} can't be served: a pass changes the model itself ({changed[0]} from "
            f"{before.get(changed[0])} to {after.get(changed[0])}), so results would depend on earlier requests."
        )


def _state(whole: nn.Module) -> dict[str, Any]:
    """Class, numbers and words of every module, by its name."""
    return {
        f"{name}.{key}": value
        for name, module in whole.named_modules()
        for key, value in (("class", type(module).__name__), *vars(module).items())
        if isinstance(value, bool | int | float | str)
    }
