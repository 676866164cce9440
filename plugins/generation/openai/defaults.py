"""Sampling defaults of OpenAI's routes: those in the model's ``generation_config.json``, else OpenAI's or SGLang's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec

from trunkline.core.errors import RequestError
from trunkline.plugins.generation.sampling.params import parse_sampling_params

log = logging.getLogger(__name__)

CHAT_TEMPERATURE = 0.7
COMPLETION_TOKENS = 16
KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def chat_defaults(path: str, source: str) -> dict[str, Any]:
    """Default sampling parameters for the model in the folder ``path``; ``source``: ``--sampling-defaults``."""
    return {"temperature": CHAT_TEMPERATURE, **_model_defaults(path, source)}


def completion_defaults(path: str, source: str) -> dict[str, Any]:
    """The same for ``/v1/completions``."""
    return {"temperature": 1.0, "max_new_tokens": COMPLETION_TOKENS, **_model_defaults(path, source)}


def _model_defaults(path: str, source: str) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    if source == "model":
        for key, value in _generation_config(Path(path)).items():
            if key in KEYS and value is not None:
                _set_if_valid(defaults, key, value, path)
    return defaults


def _set_if_valid(defaults: dict[str, Any], key: str, value: Any, path: str) -> None:
    try:
        parse_sampling_params({key: value})
    except RequestError as error:
        log.warning("%s/generation_config.json: %s=%r is left out: %s", path, key, value, error)
    else:
        defaults[key] = value


def _generation_config(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode((path / "generation_config.json").read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        log.warning("%s/generation_config.json can't be read: %s", path, error)
        return {}
