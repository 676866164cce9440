"""Schemas and grammars, requests with them, and a small model whose outputs end soon."""

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


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}  # fmt: skip
GRAMMARS: list[dict[str, str]] = [
    {"json_schema": json.dumps(SCHEMA)},
    {"regex": "[a-f]{3,20}(-[0-9]{2}){1,4}"},
    {"ebnf": 'root ::= item (";" item){2,4}\nitem ::= [A-Z] [a-z]{0,5}'},
    {"regex": "(yes|no|perhaps), [^x]{5,9}\\."},
    {},
]


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


def bodies(endings: dict[str, float], count: int = 12, **more: Any) -> list[dict[str, Any]]:
    """Requests with different grammars, prompts and seeds; some have none."""
    return [
        {
            "input_ids": [5 + (index * 7 + place * 3) % 300 for place in range(4 + 11 * (index % 3))],
            "sampling_params": {
                "max_new_tokens": 70,
                "temperature": 1.0,
                "sampling_seed": index,
                "logit_bias": endings,
                **GRAMMARS[index % len(GRAMMARS)],
                **more,
            },
        }
        for index in range(count)
    ]


def outcome(record: dict[str, Any]) -> tuple[list[int], str, Any]:
    return record["output_ids"], record["text"], record["meta_info"]["finish_reason"]


@pytest.fixture(scope="module")
def folder(zoo: Callable[[str], Path]) -> Path:
    return zoo("llama")


@pytest.fixture
def engine(recorded_engine: Callable[..., Any], folder: Path) -> Any:
    return recorded_engine(folder)


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
