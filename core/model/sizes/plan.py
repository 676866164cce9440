"""Plans a model's memory from its config: weights, keys and values, activations."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from trunkline.core.cache.pool import KVPool, KVShape
from trunkline.core.errors import ModelError
from trunkline.core.model.architecture import (
    adapt,
    choose_dtype,
    choose_kv_dtype,
    layer_count,
    options,
    output_matrix,
    resolve,
)
from trunkline.core.model.attention import NAME
from trunkline.core.model.experts import MATRICES, find_experts
from trunkline.core.model.loader import quiet
from trunkline.core.model.refusal import BYPASSED, explained, failed_pass, reason_of
from trunkline.core.model.verification.attention import shapes_of
from trunkline.core.types import ModelInfo, ModelSource, Transform

from . import dry_run

if TYPE_CHECKING:
    from trunkline.core.settings import ModelSettings

log = logging.getLogger("trunkline.model")

HIDDEN_COPIES = 8  # hidden rows that a layer has at the same time, for models that have no dry run
LOGIT_COPIES = 3  # float32: a row's logits, a changed copy, and probabilities


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """The memory demand of a model. ``active_parameters``: number of parameters that are used for one token.

    ``bytes_per_token`` and ``bytes_per_logits_row`` are estimates of the activations of a pass: for each of its
    tokens, and for each row whose logits are computed (0 for a model without output matrix).
    """

    weight_bytes: int
    kv_shapes: list[KVShape]
    kv_bytes_per_token: int
    dtype: torch.dtype
    active_parameters: int
    shapes: dict[str, torch.Size] = field(default_factory=dict)  # of the class's parameters
    bytes_per_token: int = 0
    bytes_per_logits_row: int = 0
    matrix_numbers: int = 0  # of the matrices that transforms may store otherwise: those of layers and experts
    loading_bytes: int = 0  # of weights while they are loaded, if that is more than ``weight_bytes``

    def stored_as(self, transforms: Sequence[Transform]) -> ModelPlan:
        """The plan if these transforms store the matrices; unchanged if one doesn't say how large they become."""
        bits = [one.bits for one in transforms if one.bits is not None]
        if not bits or len(bits) < len(transforms):
            return self
        saved = self.matrix_numbers * (self.dtype.itemsize - max(bits) / 8)
        return replace(self, weight_bytes=self.weight_bytes - int(saved), loading_bytes=self.weight_bytes)


@explained
def plan_model(source: ModelSource, info: ModelInfo, settings: ModelSettings, device: torch.device) -> ModelPlan:
    """The sizes of a model on ``device``, without loading weights.

    They come from a pass on the meta device. If that fails (because the forward reads values of tensors), they are
    estimated from the config. ModelError when the model can't be served.
    """
    cls, config = resolve(info)
    dtype = choose_dtype(settings.dtype, device)
    with quiet(), torch.device("meta"):
        try:
            whole = cls._from_config(config, dtype=dtype, **options(cls, info))
        except Exception as error:  # model classes raise various exceptions
            if error.args == (NAME,):  # KeyError of a class with its own table of attention functions
                raise ModelError(f"{info.architecture} can't be served: {BYPASSED}") from error
            raise ModelError(f"{source.reference} can't be built from its config: {reason_of(error)}") from error
    adapt(whole)
    shapes, activations = _pass_sizes(whole, info, dtype)
    logits = getattr(output_matrix(whole), "out_features", 0)
    return ModelPlan(
        weight_bytes=sum(tensor.nbytes for tensor in (*whole.parameters(), *whole.buffers())),
        kv_shapes=shapes,
        kv_bytes_per_token=KVPool.bytes_per_token(shapes, choose_kv_dtype(settings.kv_cache_dtype, dtype)),
        dtype=dtype,
        active_parameters=_active_parameters(whole, config),
        shapes={name: parameter.shape for name, parameter in whole.named_parameters()},
        bytes_per_token=activations + _expert_bytes(whole, config, dtype),
        bytes_per_logits_row=logits * torch.float32.itemsize * LOGIT_COPIES,
        matrix_numbers=_matrix_numbers(whole, experts=device.type == "cpu"),
    )


def _pass_sizes(whole: Any, info: ModelInfo, dtype: torch.dtype) -> tuple[list[KVShape], int]:
    """Each layer's key and value shapes (none for encoders), and the bytes of activations per token."""
    layers = layer_count(whole.config) if info.causal else 0
    try:
        with quiet():
            context, activations = dry_run.run(whole, causal=info.causal)
    except Exception as error:  # the forward reads values of tensors; exact shapes are known after loading
        log.info("%s: no dry run (%s), sizes are the config's", info.architecture, error)
        activations = HIDDEN_COPIES * info.hidden_size * dtype.itemsize
        if not info.causal:
            return [], activations
        try:
            return [_shape_in_config(whole.config.get_text_config())] * layers, activations
        except Exception:  # the config doesn't have these sizes
            raise ModelError(f"{info.architecture} can't be served: {failed_pass(error)}") from error
    return shapes_of(context, layers, info.architecture) if info.causal else [], activations


def _shape_in_config(config: Any) -> KVShape:
    """Upper bound on the shapes of a layer's keys and values: if the plan is too small, memory runs out later."""
    heads = int(config.num_attention_heads)
    widths = [config.hidden_size // heads]
    widths += [getattr(config, name, None) or 0 for name in ("head_dim", "qk_head_dim", "v_head_dim")]
    return heads, int(max(widths)), int(max(widths))


def _matrix_numbers(whole: Any, *, experts: bool) -> int:
    """How many numbers the matrices of layers have, and those of ``experts``."""
    layers = [module for module in whole.modules() if isinstance(module, torch.nn.ModuleList)]
    matrices = {id(one): one.numel() for layer in layers for one in layer.parameters() if one.ndim == 2}
    found = (module._parameters.get(name) for module in find_experts(whole) for name in MATRICES) if experts else ()
    return sum(matrices.values()) + sum(one.numel() for one in found if one is not None)


def _active_parameters(whole: Any, config: Any) -> int:
    """Number of parameters without embeddings; experts count in proportion to the share that a token uses."""
    table = getattr(whole.get_input_embeddings(), "weight", None)  # some classes have several tables
    total = 0.0
    for name, parameter in whole.named_parameters():
        if parameter is not table:
            share = min(1.0, _experts_per_token(config) / parameter.shape[0]) if _of_experts(name, parameter) else 1.0
            total += parameter.numel() * share
    return math.ceil(total)


def _expert_bytes(whole: Any, config: Any, dtype: torch.dtype) -> int:
    """Bytes of activations per token inside a layer's experts, which a dry run skips; 0 for a dense model.

    A token has a row for each of its experts: before and after, and the outputs of the matrices in between.
    """
    widths: dict[str, int] = {}  # by layer
    for name, parameter in whole.named_parameters():
        if _of_experts(name, parameter):
            hidden = config.get_text_config().hidden_size
            layer = name.partition(".experts.")[0]
            widths[layer] = widths.get(layer, 2 * hidden) + parameter.shape[1] * parameter.shape[2] // hidden
    return max(widths.values(), default=0) * _experts_per_token(config) * dtype.itemsize


def _of_experts(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter has a matrix for each expert of a layer."""
    return parameter.ndim == 3 and ".experts." in name


def _experts_per_token(config: Any) -> int:
    return int(getattr(config.get_text_config(), "num_experts_per_tok", None) or 1)
