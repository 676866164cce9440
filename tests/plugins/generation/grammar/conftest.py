"""Schemas and grammars with texts that fit them, and a small model whose outputs end soon."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

SCHEMAS: dict[str, Any] = {
    item["name"]: item["schema"]
    for item in map(json.loads, Path(__file__).with_name("schemas.jsonl").read_text(encoding="utf-8").splitlines())
}


def problem_of(schema: Any, text: str) -> str:
    """Why a text is no JSON that is valid for the schema, "" if it is."""
    try:
        value = json.loads(text)
    except ValueError as error:
        return str(error)
    formats = [name for name in jsonschema.FormatChecker.checkers if name != "time"]  # it refuses a lower-case z
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    errors = validator(schema, format_checker=jsonschema.FormatChecker(formats)).iter_errors(value)
    return next((error.message for error in errors), "")


@pytest.fixture(scope="session")
def endings(zoo: Callable[[str], Path]) -> dict[str, float]:
    """A logit_bias for the tiny model: it prefers what ends a value, and avoids whitespace."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo("llama"))
    biases = {str(tokenizer.eos_token_id): 8.0}
    for texts, bias in (('"}],:', 9.0), (" \n\t\r", -9.0)):
        for character in texts:
            (token,) = tokenizer.encode(character, add_special_tokens=False)
            biases[str(token)] = bias
    return biases
