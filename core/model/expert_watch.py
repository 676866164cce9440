"""Calls expert observers with the routing of each layer with experts.

While no observer is active, the overhead is a check of an empty tuple per layer. Forward passes outside of the
engine's (verification at load) aren't observed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trunkline.core.discovery import Provided
from trunkline.core.errors import describe_error
from trunkline.core.types import ExpertLayers, ExpertObserver, PassRow

log = logging.getLogger("trunkline.model")

Choices = list[tuple[int, torch.Tensor]]
"""For each decoder layer with experts, the experts of each packed token, int64 ``[T, k]``."""

TAP = "trunk_tap"  # attribute of experts modules and routers: (watch, number of the decoder layer)
LAYER = re.compile(r"\.(\d+)\.")  # "model.layers.3.mlp.experts": the first number is the decoder layer's


class ExpertWatch:
    """The observers of one model. They are told of a pass when its results are there."""

    def __init__(self, layers: ExpertLayers, provided: Sequence[Provided[ExpertObserver]] = ()) -> None:
        self.layers = layers
        self.provided = tuple(provided)
        self.active = False  # whether the running pass is noted
        self._noted: Choices = []
        self._shown: Sequence[PassRow] = ()  # rows of the last pass that was observed

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertWatch:
        """Copies of layers, which verification makes, share this object and so the observers."""
        return self

    def active_observers(self) -> tuple[Provided[ExpertObserver], ...]:
        """The observers that want to be told of the pass that is about to start."""
        return tuple(one for one in self.provided if _is_active(one))

    @contextmanager
    def noting(self, choices: Choices) -> Iterator[None]:
        """Wraps a forward pass: appends each layer with experts to ``choices``, and the tensor of those chosen."""
        self.active, self._noted = True, choices
        try:
            yield
        finally:
            self.active, self._noted = False, []

    def observe(self, layer: int, chosen: torch.Tensor) -> None:
        """Called in a pass that is noted: tokens go to the experts ``chosen``, int64 ``[T, k]``, in a decoder layer."""
        self._noted.append((layer, chosen))

    def tell(
        self,
        observers: Sequence[Provided[ExpertObserver]],
        rows: Sequence[PassRow],
        used: Sequence[bool],
        choices: Choices,
    ) -> None:
        """Tell observers of a pass over packed ``rows``, of which only those that are ``used`` count.

        If a row's results can't be used after all, it is computed again, alone, and not observed a second time.
        """
        kept = [row for row, counts in zip(rows, used, strict=True) if counts]
        if all(any(row is shown for shown in self._shown) for row in kept):
            return
        self._shown = rows
        if len(kept) < len(rows):
            mask = torch.tensor(used).repeat_interleave(torch.tensor([row.end - row.start for row in rows]))
            choices = [(layer, chosen[mask]) for layer, chosen in choices]
        for one in observers:
            _tell(one, kept, choices)

    @property
    def observers(self) -> tuple[ExpertObserver, ...]:
        return tuple(one.value for one in self.provided)


def _tell(one: Provided[ExpertObserver], rows: Sequence[PassRow], choices: Choices) -> None:
    """Call an observer. If it raises, it isn't called again for this pass; no request fails."""
    method = "begin_pass"
    try:
        one.value.begin_pass(rows)
        method = "observe"
        for layer, chosen in choices:
            one.value.observe(layer, chosen)
        method = "end_pass"
        one.value.end_pass()
    except BaseException as error:
        _log_failure(one, method, error)


def _is_active(one: Provided[ExpertObserver]) -> bool:
    try:
        return bool(one.value.active)
    except BaseException as error:
        _log_failure(one, "active", error)
        return False


def _log_failure(one: Provided[ExpertObserver], method: str, error: BaseException) -> None:
    name = type(one.value).__name__
    log.error(
        "%s",
        one.failed(f"{name}.{method} failed and isn't called again in this pass: {describe_error(error)}"),
        exc_info=error,
    )


def watch_experts(model: Any) -> ExpertWatch | None:
    """Attach a watch to the layers with experts of a PackedModel; None when it is dense.

    Must be called again after modules were replaced. If the routing can't be observed, ``layers.unseen`` says why.
    """
    if not model.info.num_experts:
        return None
    depth = int(model.whole.config.get_text_config().num_hidden_layers)
    taps = {} if model.padded else _taps(model.backbone)
    if not taps:
        reason = "padding would be counted" if model.padded else "its routing can't be observed"
        layers = ExpertLayers((), depth, model.info.num_experts, f"{model.info.architecture}: {reason}.")
        return ExpertWatch(layers)
    watch = ExpertWatch(ExpertLayers(tuple(sorted(taps)), depth, model.info.num_experts))
    for layer, module in taps.items():
        if not hasattr(module, "has_gate") and TAP not in vars(module):
            module.register_forward_hook(_from_router)
        setattr(module, TAP, (watch, layer))
    return watch


def _taps(backbone: Any) -> dict[int, Any]:
    """By decoder layer: modules that call our experts function, else Llama 4's routers, whose output is used."""
    experts: dict[int, Any] = {}
    routers: dict[int, Any] = {}
    for name, module in backbone.named_modules(prefix="backbone"):
        found = LAYER.search(name)
        if found and hasattr(module, "has_gate") and hasattr(module, "num_experts"):
            experts[int(found[1])] = module
        elif found and name.endswith(".router") and hasattr(module, "top_k"):
            routers[int(found[1])] = module
    return experts or {layer: module for layer, module in routers.items() if type(module).__name__ == "Llama4Router"}


def _from_router(module: Any, _: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Forward hook of Llama 4's router, which returns scores and logits: tokens go to the ``top_k`` largest."""
    watch, layer = getattr(module, TAP)
    if watch.active:
        watch.observe(layer, torch.topk(output[1], module.top_k, dim=1).indices)
