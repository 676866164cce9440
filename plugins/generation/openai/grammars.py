"""From the fields that constrain the output (OpenAI's, SGLang's and vLLM's) to one grammar as a sampling parameter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from trunkline.core.errors import RequestError
from trunkline.core.server.api import encode_json

from .chat_schemas import ChatBody
from .completion_schemas import CompletionBody

ANY_OBJECT = '{"type": "object"}'
FORMATS = ("text", "json_object", "json_schema", "structural_tag")
SPECIAL = re.compile(r"[\\^$.|?*+()\[\]{}]")  # characters that have a meaning in regular expressions
# Key of vLLM's structured_outputs -> key of the sampling parameters, where the value needs no conversion.
STRUCTURED = {"regex": "regex", "grammar": "ebnf"}
# Its options that have no counterpart.
OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")


class GrammarField(NamedTuple):
    """A grammar: the ``field`` of the body that has it, and the ``key`` and value of the sampling parameter."""

    field: str
    key: str
    text: str


def read_grammar(body: ChatBody | CompletionBody) -> GrammarField | None:
    """The grammar of a body, None if it has none. RequestError if it has several, or one that is invalid."""
    found = [*_extras(body)]
    if body.response_format is not None:
        found += _response_format(body.response_format)
    if body.structured_outputs is not None:
        found += _structured_outputs(body.structured_outputs)
    if len(found) > 1:
        fields = " and ".join(dict.fromkeys(grammar.field for grammar in found))
        raise RequestError(f"Only one grammar can be set; the request has {fields}.", param=found[1].field)
    return found[0] if found else None


def _extras(body: ChatBody | CompletionBody) -> Iterator[GrammarField]:
    """The grammars in top-level fields; empty ones are none."""
    if body.regex:
        yield GrammarField("regex", "regex", body.regex)
    if body.ebnf:
        yield GrammarField("ebnf", "ebnf", body.ebnf)
    if body.json_schema:
        yield GrammarField("json_schema", "json_schema", _json_text(body.json_schema))
    if body.structural_tag:
        yield GrammarField("structural_tag", "structural_tag", _json_text(body.structural_tag))
    if body.guided_json:
        yield GrammarField("guided_json", "json_schema", _json_text(body.guided_json))
    if body.guided_regex:
        yield GrammarField("guided_regex", "regex", body.guided_regex)
    if body.guided_choice:
        yield GrammarField("guided_choice", "regex", _alternatives("guided_choice", body.guided_choice))
    if body.guided_grammar:
        yield GrammarField("guided_grammar", "ebnf", body.guided_grammar)


def _response_format(value: dict[str, Any]) -> Iterator[GrammarField]:
    """OpenAI's ``response_format``, or SGLang's with a structural tag. Errors are worded as OpenAI's."""
    name = "response_format"
    kind = _required(value, "type", name)
    if kind not in FORMATS:
        supported = ", ".join(f"'{each}'" for each in FORMATS[:-1])
        raise RequestError(
            f"Invalid value: {kind!r:.60}. Supported values are: {supported}, and '{FORMATS[-1]}'.",
            param=f"{name}.type",
        )
    if kind == "json_object":
        yield _object_format(value)
    elif kind == "structural_tag":
        yield GrammarField(name, "structural_tag", _json_text(value))
    elif kind == "json_schema":
        yield GrammarField(name, "json_schema", _named_schema(_required(value, "json_schema", name)))


def _object_format(value: dict[str, Any]) -> GrammarField:
    """Any object, or one of the schema in ``value`` (huggingface_hub) or in ``schema`` (clients of llama.cpp)."""
    name = "response_format"
    for key in ("value", "schema"):
        schema = value.get(key)
        if schema is not None:
            if not isinstance(schema, dict):
                raise RequestError(f"Invalid type for '{name}.{key}': expected an object.", param=f"{name}.{key}")
            return GrammarField(name, "json_schema", _json_text(schema))
    return GrammarField(name, "json_schema", ANY_OBJECT)


def _named_schema(value: Any) -> str:
    """The schema in ``response_format.json_schema``. It is enforced with and without ``strict``."""
    name = "response_format.json_schema"
    if not isinstance(value, dict):
        raise RequestError(f"Invalid type for '{name}': expected an object.", param=name)
    if not isinstance(_required(value, "name", name), str):
        raise RequestError(f"Invalid type for '{name}.name': expected a string.", param=f"{name}.name")
    strict = value.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"Invalid type for '{name}.strict': expected true, false or null.", param=f"{name}.strict")
    schema = _required(value, "schema", name)
    if not isinstance(schema, dict):
        raise RequestError(f"Invalid type for '{name}.schema': expected an object.", param=f"{name}.schema")
    return _json_text(schema)


def _required(value: dict[str, Any], key: str, name: str) -> Any:
    if value.get(key) is None:
        raise RequestError(f"Missing required parameter: '{name}.{key}'.", param=f"{name}.{key}")
    return value[key]


def _structured_outputs(value: dict[str, Any]) -> Iterator[GrammarField]:
    """vLLM's ``structured_outputs``."""
    for key, setting in value.items():
        field = f"structured_outputs.{key:.40}"
        if setting is None or (key in (*OPTIONS, "json_object") and not setting):
            continue
        if key in ("json", "structural_tag"):
            if not isinstance(setting, str | dict):
                raise RequestError(f"{field} must be an object or its JSON text.", param=field)
            yield GrammarField(field, "json_schema" if key == "json" else key, _json_text(setting))
        elif key == "json_object":
            yield GrammarField(field, "json_schema", ANY_OBJECT)
        elif key == "choice":
            yield GrammarField(field, "regex", _alternatives(field, setting))
        elif key in STRUCTURED:
            if not isinstance(setting, str):
                raise RequestError(f"{field} must be a string.", param=field)
            yield GrammarField(field, STRUCTURED[key], setting)
        else:
            raise RequestError(f"{field} is not supported; leave it out or set it to null.", param=field)


def _alternatives(field: str, choices: Any) -> str:
    """A regular expression for exactly these texts."""
    if not isinstance(choices, list) or not choices or not all(isinstance(each, str) and each for each in choices):
        raise RequestError(f"{field} must be a list of texts that aren't empty.", param=field)
    return "(" + "|".join(SPECIAL.sub(r"\\\g<0>", choice) for choice in choices) + ")"


def _json_text(value: str | dict[str, Any]) -> str:
    return value if isinstance(value, str) else encode_json(value).decode()
