"""Which transformers class a checkpoint is, and why some can't be served."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from trunkline.kernels.linear import has_bfloat16

from ..errors import ModelError
from ..types import ModelInfo
from . import attention, experts

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
    except Exception as error:  # config classes raise whatever comes up
        raise ModelError(f"{info.path}/config.json is refused by transformers: {error}") from error
    if reason := why_not(cls, config):
        raise ModelError(f"{info.architecture} can't be served: {reason}")
    return cls, config


def why_not(cls: Any, config: Any) -> str:
    """The reason against a model that its class and config give away; "" when there is none."""
    text = config.get_text_config()
    if getattr(cls, "_is_stateful", False) or RECURRENT_LAYERS & set(getattr(text, "layer_types", None) or ()):
        return "it keeps a recurrent state, which can be neither shared between requests nor cut at a token."
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder; only decoders and encoders are."
    if getattr(text, "attn_temperature_tuning", False):
        return "its attention temperature counts positions from the start of the batch, not of the sequence."
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantised; use the float16, bfloat16 or float32 checkpoint."
    return ""


def backbone_of(whole: Any) -> Any:
    """What a class with a head runs underneath it: ids in, last hidden state after the final norm out."""
    base = whole.base_model
    # Some classes with a head have the prefix of another class, and then call themselves their own base.
    return getattr(whole, "model", whole) if base is whole else base


def adapt(whole: Any) -> None:
    """Turn off a check that packed rows don't need and that reads ids back from the device each pass."""
    backbone_of(whole).warn_if_padding_and_no_attention_mask = lambda *_: None


def layer_count(config: Any) -> int:
    """How many attention layers one forward pass goes through."""
    return int(config.get_text_config().num_hidden_layers)


def choose_dtype(asked: str, device: torch.device) -> torch.dtype:
    """The torch dtype for ``--dtype``. ``auto`` is bfloat16 where the hardware multiplies it, else float32."""
    if asked == "auto":
        native = device.type != "cpu" or has_bfloat16()
        return torch.bfloat16 if native else torch.float32
    dtype = DTYPES[asked]
    if dtype is torch.float16 and device.type == "cpu":
        raise ModelError("--dtype float16 is slow and inexact on a CPU; use bfloat16 or float32.")
    return dtype
