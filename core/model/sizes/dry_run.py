"""A forward pass on the meta device, where tensors have shapes but no values."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trunkline.core.model.architecture import backbone_of
from trunkline.core.model.attention import ForwardContext, packed_layout

if TYPE_CHECKING:
    from trunkline.kernels.backend import Backend

TOKENS = 16  # of a dry run


class _ShapesOnly:
    """A backend whose attention only makes its result."""

    @staticmethod
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def run(whole: Any, *, causal: bool) -> tuple[ForwardContext, int]:
    """Run a transformers model on the meta device over ``TOKENS`` tokens.

    Returns the context, with the shapes of keys and values, and the bytes that activations take at most per token.
    Raises what the forward raises, for example because it reads values of tensors.
    """
    context = ForwardContext(packed_layout([TOKENS]), None, cast("Backend", _ShapesOnly()))
    ids = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    backbone = backbone_of(whole)
    given = {"position_ids": ids, "past_key_values": None, "use_cache": False}
    if not causal:
        given = {name: given[name] for name in given.keys() & inspect.signature(backbone.forward).parameters}
    with torch.inference_mode(), peak_bytes() as measured:
        backbone(input_ids=ids, trunk=context, **given)
    return context, -(-measured.peak // TOKENS)


@contextmanager
def peak_bytes() -> Iterator[PeakBytes]:
    """Measure the tensors that are made inside and alive at the same time, in bytes."""
    measured = PeakBytes()
    with measured:
        yield measured


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations make. Views count once, with what they are views of."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.alive = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._known.add(tensor.untyped_storage())  # weights and inputs aren't activations
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _freed(self, count: int) -> None:
        self.alive -= count
