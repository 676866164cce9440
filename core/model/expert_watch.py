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

TAP = "trunk_tap"  # attribute of experts modules and routers: (watch, number of the decoder layer)
LAYER = re.compile(r"\.(\d+)\.")  # "model.layers.3.mlp.experts": the first number is the decoder layer's


class ExpertWatch:
    """The observers of one model, and which of them observe the running pass."""

    def __init__(self, layers: ExpertLayers, provided: Sequence[Provided[ExpertObserver]] = ()) -> None:
        self.layers = layers
        self.provided = tuple(provided)
        self.active: tuple[Provided[ExpertObserver], ...] = ()  # observers of the running pass; () between passes
        self._noted: list[tuple[int, torch.Tensor]] | None = None
        self._shown: Sequence[PassRow] = ()  # rows of the last completed pass that was observed

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertWatch:
        """Copies of layers, which verification makes, share this object and so the observers."""
        return self

    @contextmanager
    def watching(self, rows: Sequence[PassRow]) -> Iterator[None]:
        """Wraps one pass over packed ``rows``. ``end_pass`` is called only if the pass didn't raise.

        If the results of an observed pass couldn't be used, each of its rows runs again alone; these passes aren't
        observed.
        """
        again = bool(rows) and all(any(row is shown for shown in self._shown) for row in rows)
        self.active = () if again else tuple(one for one in self.provided if _is_active(one))
        if not self.active:
            yield
            return
        try:
            self._tell("begin_pass", rows)
            yield
            self._tell("end_pass")
            self._shown = rows
        finally:
            self.active = ()

    @contextmanager
    def noting(self, choices: list[tuple[int, torch.Tensor]]) -> Iterator[None]:
        """Wraps the pass of a graph that is captured: appends each layer with experts, and the tensor of those chosen.

        Its replays don't call :meth:`observe`.
        """
        self._noted, self.active = choices, self.provided
        try:
            yield
        finally:
            self._noted, self.active = None, ()

    def observe(self, layer: int, chosen: torch.Tensor) -> None:
        """Tell the observers that tokens were sent to the experts ``chosen``, int64 ``[T, k]``, in decoder layer
        ``layer``."""
        if self._noted is None:
            self._tell("observe", layer, chosen)
        else:
            self._noted.append((layer, chosen))

    @property
    def observers(self) -> tuple[ExpertObserver, ...]:
        return tuple(one.value for one in self.provided)

    def _tell(self, method: str, *arguments: Any) -> None:
        """Call a method of the active observers. One that raises isn't called again in this pass; no request fails."""
        for one in self.active:
            try:
                getattr(one.value, method)(*arguments)
            except BaseException as error:
                self.active = tuple(other for other in self.active if other is not one)
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
