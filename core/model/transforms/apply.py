"""Stores the weights of a loaded model's linear layers as the plugins' transforms say, and measures what that costs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from trunkline.core.errors import ModelError
from trunkline.core.model.fusion.decoder_forward import FusedForward
from trunkline.core.model.fusion.encoder_layer import FusedEncoderForward
from trunkline.core.model.fusion.warm_up import TOLERANCE
from trunkline.core.model.sources.quantized_tensor import QuantizedTensor
from trunkline.core.types import Transform
from trunkline.kernels.linear import LinearLayer

from .matrices import ModelMatrices

if TYPE_CHECKING:
    from trunkline.core.discovery import Provided
    from trunkline.core.model.packed import PackedModel

log = logging.getLogger("trunkline.model")

PIECE = 1024  # rows of a weight
NAMED = 32  # matrices in a log message: a mixture of experts may have thousands
ROWS = 8  # of random numbers, on which a layer's error is measured
# Of hidden rows after all layers, where rows are rounded to integers: last bits decide about some of them.
ROUNDED = 0.1


@torch.inference_mode()
def apply_transforms(
    model: PackedModel, provided: Sequence[Provided[Transform]], stored: Mapping[str, object] = MappingProxyType({})
) -> str:
    """Replace the linear layers of layers and experts, in place; returns a sentence about the result, "" if there is
    nothing to do. Each original's memory is freed when it is replaced. ``stored``: the checkpoint's tensors by name.

    ModelError if no weight can be stored so. PluginError, by the plugin's name, for a transform that fails.
    """
    if not provided:
        return ""
    results: dict[str, list[float]] = {}  # by transform: the errors of its layers
    kept: list[str] = []
    packed: set[str] = set()
    forward = model.backbone.forward
    if isinstance(forward, FusedForward | FusedEncoderForward):
        forward.forget()
    for matrix in ModelMatrices(model, stored):
        for one in provided:
            replacement, error = _packed(one, matrix.names, matrix.linear, model.dtype)
            if replacement is not None:
                results.setdefault(one.value.name, []).append(error)
                packed.update(matrix.names)
                matrix.replace(replacement)
                break
        else:
            kept.append(matrix.names[0])
    if isinstance(forward, FusedForward | FusedEncoderForward):
        lossy = bool(results) and any(one.value.error for one in provided)
        forward.verify(ROUNDED if lossy else TOLERANCE)
    quantised = [name for name, one in stored.items() if isinstance(one, QuantizedTensor)]
    if lost := [name for name in quantised if name not in packed]:
        # Embeddings, output matrices, routers, and those that a transform has refused.
        text = "%s: %d of the checkpoint's %d quantised matrices are dequantised, the first is %s"
        log.warning(text, model.info.architecture, len(lost), len(quantised), lost[0])
    if not results and all(one.value.optional for one in provided):
        log.info("%s: no matrix is stored as %s", model.info.architecture, provided[0].value.name)
        return ""
    if not results:
        asked = ", ".join(one.value.name for one in provided)
        raise ModelError(f"No weight of {model.info.architecture} can be stored as {asked}; leave that out.")
    total = sum(map(len, results.values())) + len(kept)
    parts = [f"{len(errors)} of {total} matrices as {name}" for name, errors in results.items()]
    if kept:
        named = ", ".join(kept[:NAMED]) + (f" and {len(kept) - NAMED} more" if len(kept) > NAMED else "")
        log.info("%s: these matrices stay as they are: %s", model.info.architecture, named)
    for name, errors in results.items():
        log.info("%s: relative errors of %s are %.4f to %.4f", model.info.architecture, name, min(errors), max(errors))
    return ", ".join(parts)


def _packed(
    provided: Provided[Transform], names: list[str], linear: LinearLayer, dtype: torch.dtype
) -> tuple[LinearLayer | None, float]:
    """The replacement of a layer and its error; None if the weight stays as it is."""
    transform, weight = provided.value, linear.weight(slice(0, linear.out_features))
    try:
        replacement = transform.pack(names, weight)
        if replacement is None:
            return None, 0.0
        if not isinstance(replacement, LinearLayer):
            raise TypeError(f"pack must return a LinearLayer or None, not a {type(replacement).__name__}")
        rows = torch.randn(ROWS, linear.in_features, generator=torch.Generator().manual_seed(4))
        rows = rows.to(weight)
        plain = copy.copy(linear)
        plain.set_bias(None)
        expected, result = plain.forward(rows), replacement.forward(rows)
        if result.shape != expected.shape or result.dtype != dtype:
            raise TypeError(
                f"the layer gives {result.dtype} {tuple(result.shape)}, not {dtype} {tuple(expected.shape)}"
            )
        if not _comes_back(replacement, weight, exact=not transform.error):
            raise ValueError("the weight that comes back from the layer isn't the one that it was given")
        replacement.set_bias(linear.bias)
    except ModelError:
        raise
    except Exception as problem:
        raise provided.failed(f"the transform {transform.name!r} failed for {names[0]}: {problem}") from problem
    error = float((result.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    rounding = float(torch.finfo(dtype).eps) * 4
    if not error <= transform.error + rounding:
        log.warning("%s stays as it is: as %s its error would be %.4f", names[0], transform.name, error)
        return None, error
    return replacement, error


def _comes_back(layer: LinearLayer, weight: torch.Tensor, *, exact: bool) -> bool:
    """Whether the layer gives its weight back, with the same bits if ``exact``; in pieces, to save memory."""
    for rows in range(0, len(weight) if exact else 1, PIECE):
        part = weight[rows : rows + PIECE]
        back = layer.weight(slice(rows, rows + len(part)))
        if back.shape != part.shape or (exact and not torch.equal(back, part)):
            return False
    return True
