"""Finds the transformers class of a checkpoint, and the reason why some can't be served."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from trunkline.core.errors import ModelError
from trunkline.core.types import ModelInfo
from trunkline.kernels.backend import multiplies_bfloat16

from . import attention, experts, rotary
from .sources.quantized import formats

RECURRENT_LAYERS = frozenset(("linear_attention", "mamba", "mamba2", "conv", "recurrent", "ssm"))
DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}


def resolve(info: ModelInfo) -> tuple[Any, Any]:
    """The transformers class and its config object. ModelError when it can't be served."""
    attention.register()
    experts.register()
    cls = getattr(transformers, info.architecture, None)
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        raise ModelError(
            f"transformers {transformers.__version__} has no class {info.architecture}. "
            "A newer release may have it; code that comes with a checkpoint is never run."
        )
    try:
        config = AutoConfig.from_pretrained(info.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # config classes raise various exceptions
        raise ModelError(f"{info.path}/config.json is refused by transformers: {error}") from error
    if reason := why_not(cls, config):
        raise ModelError(f"{info.architecture} can't be served: {reason}")
    if hasattr(config, formats.KEY):
        delattr(config, formats.KEY)  # transformers gets numbers, and must not look for integers
    if not info.causal and not info.score_rows:
        # Heads that predict masked tokens, answers or tags aren't used.
        cls = base_class(config, cls) or cls
    return cls, config


def base_class(config: Any, cls: Any) -> Any:
    """The class without heads below ``cls`` for a config object, None when transformers has none."""
    found = transformers.MODEL_MAPPING.get(type(config), None)
    if isinstance(found, tuple):  # some configs have several
        return cls if cls in found else found[0]
    return found


def padded_only(cls: Any, info: ModelInfo) -> bool:
    """Whether it is an encoder whose attention can't be replaced in transformers; it runs padded batches."""
    return not info.causal and not cls._supports_attention_backend


def options(cls: Any, info: ModelInfo) -> dict[str, Any]:
    """Arguments for the constructor of a class: our attention and experts functions, and no unused pooler."""
    attend = attention.EAGER if padded_only(cls, info) else attention.NAME
    given: dict[str, Any] = {"attn_implementation": attend, "experts_implementation": attention.NAME}
    if "add_pooling_layer" in inspect.signature(cls.__init__).parameters:
        given["add_pooling_layer"] = False
    return given


def why_not(cls: Any, config: Any) -> str:
    """The reason why a model can't be served, as far as its class and config show; "" if there is none."""
    text = config.get_text_config()
    if getattr(cls, "_is_stateful", False) or RECURRENT_LAYERS & set(getattr(text, "layer_types", None) or ()):
        return "it keeps a recurrent state, which can be neither shared between requests nor cut at a token."
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; only decoders and encoders are."
    if getattr(text, "attn_temperature_tuning", False):
        return "its attention temperature counts positions from the start of the batch, not of the sequence."
    if kind := rotary.unknown_type(text):
        return f"transformers {transformers.__version__} has no rotary scaling of the type {kind!r}."
    try:
        formats.find({formats.KEY: getattr(config, formats.KEY, None)})
    except ModelError as error:
        return str(error)
    return ""


def backbone_of(whole: Any) -> Any:
    """The module below the head: from token ids to the last hidden state after the final norm."""
    base = whole.base_model
    # ``base_model`` is the object itself in classes with a head whose ``base_model_prefix`` is another class's.
    return getattr(whole, "model", whole) if base is whole else base


def output_matrix(whole: Any) -> Any:
    """The module that computes logits from hidden rows; None in classes without one."""
    try:
        return whole.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def adapt(whole: Any) -> None:
    """Prepare a model for packed rows.

    Disables a check for padding, which isn't needed and reads ids back from the device in each pass, and numbers
    attention modules without ``layer_idx``.
    """
    backbone = backbone_of(whole)
    backbone.warn_if_padding_and_no_attention_mask = lambda *_: None
    nameless = [
        module
        for module in backbone.modules()
        if hasattr(module, "is_causal") and getattr(module, "layer_idx", None) is None
    ]
    for number, module in enumerate(nameless):
        module.layer_idx = number


def has_token_types(backbone: Any) -> bool:
    """Whether the model has token types, that is, an embedding that marks the second text of a pair."""
    types = getattr(backbone.config, "type_vocab_size", None) or 0
    return types > 1 and "token_type_ids" in inspect.signature(backbone.forward).parameters


def position_table(backbone: Any) -> nn.Embedding | None:
    """The learned embeddings of absolute positions, in classes that name them ``position_embeddings``."""
    for name, module in backbone.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            return module
    return None


def position_offset(backbone: Any) -> int:
    """Index of the first token's position in the position table: padding index + 1 in RoBERTa and similar models."""
    table = position_table(backbone)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def layer_count(config: Any) -> int:
    """Number of attention layers. ModelError when the config doesn't have it."""
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    if layers is None:
        raise ModelError(f"{type(text).__name__} has no num_hidden_layers; models without it aren't supported.")
    return int(layers)


def choose_dtype(asked: str, device: torch.device) -> torch.dtype:
    """The torch dtype for ``--dtype``. ``auto`` is bfloat16 if the hardware has instructions for it, else float32."""
    if asked == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device.type) else torch.float32
    dtype = DTYPES[asked]
    if dtype is torch.float16 and device.type == "cpu":
        raise ModelError("--dtype float16 is slow and inexact on a CPU; use bfloat16 or float32.")
    return dtype


def choose_kv_dtype(asked: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the KV pool for ``--kv-cache-dtype``, of a model of ``dtype``."""
    return torch.int8 if asked == "int8" else dtype
