"""Builds the replies of the routes about the server and its models: model info, server info, model cards."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import msgspec

from trunkline.core.settings import ModelSettings
from trunkline.core.types import ServedModel, Settings

SECRETS = ("api_key", "admin_api_key")
PREFERRED = "preferred_sampling_params"  # a key of the contract; a plugin gives its value, if any does


class InfoReplies:
    """The replies about a model.

    ``extra`` returns the plugins' keys about a model (hook ``info``), ``status`` its current load, as in
    ``internal_states``.
    """

    def __init__(
        self,
        settings: Settings,
        models: Sequence[ModelSettings],
        extra: Callable[[ServedModel], Mapping[str, Any]],
        status: Callable[[ServedModel], dict[str, Any]],
    ) -> None:
        self._settings = redacted(settings)
        self._models = {model.name: model.table() for model in models}
        self._ask = extra
        self._extras: dict[str, tuple[ServedModel, Mapping[str, Any]]] = {}
        self.status = status
        self._created = int(time.time())
        self._version = version("trunkline")

    def model_info(self, model: ServedModel) -> dict[str, Any]:
        """Exactly the five keys of SGLang's ``/get_model_info``."""
        return {
            "model_path": model.model_path,
            "is_generation": model.is_generation,
            "tokenizer_path": model.tokenizer_path,
            PREFERRED: self._extra(model).get(PREFERRED),
            "weight_version": model.weight_version,
        }

    def long_model_info(self, model: ServedModel) -> dict[str, Any]:
        """The five keys, with objects instead of JSON strings, and more keys."""
        keys = {**self._extra(model), **self.model_info(model)}
        if isinstance(keys[PREFERRED], str):
            keys[PREFERRED] = json.loads(keys[PREFERRED])
        return keys | {
            "served_model_name": model.name,
            "aliases": list(model.aliases),
            "model_type": model.info.model_type,
            "architectures": [model.info.architecture],
            "context_length": model.info.context_length,
            "vocab_size": model.info.vocab_size,
            "max_total_num_tokens": model.max_total_tokens,
            "dtype": model.dtype,
            "kv_cache_dtype": model.kv_cache_dtype,
            "attention_backend": model.attention_backend,
            "deterministic": model.deterministic,
            "fused": model.fused,
            "stored_as": model.stored_as,
            "tasks": list(model.tasks),
            "refused": model.refused,
        }

    def server_info(self, model: ServedModel) -> dict[str, Any]:
        """One flat object: settings under their flags' names, overridden by the values in effect."""
        in_effect = {
            "model_path": model.model_path,
            "tokenizer_path": model.tokenizer_path,
            "served_model_name": model.name,
            "served_model_aliases": list(model.aliases),
            "context_length": model.info.context_length,
            "max_running_requests": model.max_running_requests,
            "chunked_prefill_size": model.chunked_prefill_size,
            "attention_backend": model.attention_backend,
            "dtype": model.dtype,
            "kv_cache_dtype": model.kv_cache_dtype,
            "weight_version": model.weight_version,
            "device": model.device,
            "load_format": "auto",
            "page_size": 1,
            "tp_size": 1,
            "dp_size": 1,
        }
        settings: dict[str, Any] = {
            "max_req_input_len": max(0, model.max_request_tokens - 1),  # plugins may override it
            **self._settings,
            **self._given(model),
            **self._extra(model),
            **in_effect,
        }
        return settings | {
            "status": "ready",
            "version": self._version,
            "max_total_num_tokens": model.max_total_tokens,
            "internal_states": [settings | self.status(model)],
        }

    def card(self, model: ServedModel) -> dict[str, Any]:
        """OpenAI's description of a model. ``owned_by`` has SGLang's value."""
        return {
            "id": model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "sglang",
            "root": model.name,
            "parent": None,
            "max_model_len": model.info.context_length,
        }

    def _given(self, model: ServedModel) -> dict[str, Any]:
        """A model's settings. They are found by an alias where a weight update has renamed the model."""
        given = next((self._models[name] for name in (model.name, *model.aliases) if name in self._models), {})
        return given if given.get("model_path") == model.model_path else given | {"revision": None}

    def _extra(self, model: ServedModel) -> dict[str, Any]:
        """The plugins' keys, computed at the first use and again after a weight update."""
        known = self._extras.get(model.name)
        if known is None or known[0] is not model:
            for former in model.aliases:
                self._extras.pop(former, None)
            known = self._extras[model.name] = model, self._ask(model)
        return dict(known[1])


def redacted(settings: Settings) -> dict[str, Any]:
    """All settings by field name; keys are replaced by ``***``."""
    flat: dict[str, Any] = {}
    for group in settings.values():
        flat.update(msgspec.to_builtins(group))
    flat.update((key, "***") for key in SECRETS if flat.get(key))
    return flat
