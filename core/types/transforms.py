"""Describes another way to store weights: quantised, or in a plugin's own layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from trunkline.kernels.linear import LinearLayer


@dataclass(frozen=True, slots=True)
class Transform:
    """Another way to store the weights of a model's linear layers, in place of the numbers of its checkpoint.

    ``pack(names, weight)`` makes a layer, without bias, that stores ``weight`` [N, K] and multiplies by it; None if
    this weight stays as it is. The tensor has the model's dtype and device, and doesn't outlive the call. ``names`` are
    the checkpoint's tensors that are merged in it, one below the other. Where a tensor has the matrices of all experts,
    the expert's number follows its name: ``…experts.down_proj[3]``. The layer's method ``weight`` is the way back:
    ``/get_weights_by_name`` calls it.

    ``error``: the largest relative error of a layer's results, as the root mean square over rows of random numbers.
    Core measures it at load, and a weight whose layer exceeds it stays as it is. 0: nothing is lost, and the weight
    must come back with the same bits. ``bits``: stored for each number, if all matrices are packed; None if they may
    not be, and the plan of the memory counts them as plain. ``optional``: whether a model is served of which it packs
    nothing.
    """

    name: str
    pack: Callable[[Sequence[str], torch.Tensor], LinearLayer | None]
    error: float
    bits: float | None = None
    optional: bool = False
