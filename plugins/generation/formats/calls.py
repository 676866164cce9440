"""Tool calls: from what a response template makes of the model's text to names and JSON arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from msgspec import Struct

MAX_REFERENCES = 16  # of a schema to its definitions, one after another
MAX_CALLS = 128  # calls of one reply; more are left as text


class ToolCall(Struct, frozen=True):
    """A call of a function. ``arguments`` is a JSON object as text, or of a call that isn't complete its beginning."""

    name: str
    arguments: str


class InvalidCall(ValueError):
    """The model's text is no tool call."""


def read_calls(value: Any, schemas: Mapping[str, Any]) -> list[ToolCall]:
    """The calls in a parsed region: one call, a list of them, or text with JSON objects. InvalidCall if it has none.

    ``schemas``: the tools' ``parameters`` by name, which give the types of arguments that are written as plain text.
    """
    if isinstance(value, str):
        value = list(_objects(value))
    items = value if isinstance(value, list) else [value]
    if not items or len(items) > MAX_CALLS:
        raise InvalidCall(f"a call has 1 to {MAX_CALLS} functions")
    return [_read_call(item, schemas) for item in items]


def _objects(text: str) -> Iterator[Any]:
    """The JSON values in a text, which may be separated by semicolons or commas; response templates have no such
    content. InvalidCall for anything else."""
    decoder, position = json.JSONDecoder(), 0
    while position < len(text):
        if text[position] in " \t\r\n;,":
            position += 1
            continue
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            raise InvalidCall("not JSON") from None
        yield from value if isinstance(value, list) else [value]


def _read_call(item: Any, schemas: Mapping[str, Any]) -> ToolCall:
    function = item.get("function", item) if isinstance(item, dict) else None
    if isinstance(function, str) and isinstance(item, dict):  # {"function": NAME, "parameters": …}
        function = {**item, "name": function}
    if not isinstance(function, dict):
        raise InvalidCall("not an object")
    name = function.get("name")
    arguments = function.get("arguments", function.get("parameters"))
    if not isinstance(name, str) or not name.strip():
        raise InvalidCall("no name")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise InvalidCall("arguments aren't JSON") from None
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise InvalidCall("arguments aren't an object")
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    if not _is_encodable(text):
        text = json.dumps(arguments)
    if not _is_encodable(name):
        raise InvalidCall("the name isn't text")
    return ToolCall(name.strip(), text)


def _is_encodable(text: str) -> bool:
    """Whether a text has no lone surrogates, which JSON's escapes can make."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def with_types(arguments: dict[str, Any], schema: Any) -> dict[str, Any]:
    """Arguments whose text is converted to the types of the tool's schema, for formats without types of their own."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        return arguments
    return {
        key: _converted(value, properties[key], schema) if isinstance(value, str) and key in properties else value
        for key, value in arguments.items()
    }


def choices_of(schema: Any) -> list[Any]:
    """The values that a schema lists, [] if it lists none."""
    if not isinstance(schema, dict):
        return []
    values = [*schema["enum"]] if isinstance(schema.get("enum"), list) else []
    return [*values, schema["const"]] if "const" in schema else values


def plain_text(value: Any) -> str:
    """A value as formats without types write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _converted(text: str, schema: Any, root: Any) -> Any:
    """The JSON value in ``text`` if the schema allows its type, else ``text``, as it is where it allows strings."""
    for choice in choices_of(schema):
        if plain_text(choice) == text:
            return choice
    types = set(schema_types(schema, root))
    if not types:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = {"True": True, "False": False, "None": None}.get(text.strip(), text)
    for kind, check in _CHECKS.items():
        if kind in types and check(value):
            return value
    return text


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and (isinstance(value, int) or value.is_integer()),
    "number": _is_number,
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def schema_types(schema: Any, root: Any, depth: int = 0) -> Iterator[str]:
    """The types that a schema names, in its parts and in definitions of ``root``, too; ``depth``: of references."""
    if not isinstance(schema, dict) or depth > MAX_REFERENCES:
        return
    declared = schema.get("type")
    yield from (name for name in (declared if isinstance(declared, list) else [declared]) if isinstance(name, str))
    values = choices_of(schema)
    if declared is None and values:
        yield from (kind for kind, check in _CHECKS.items() if any(check(value) for value in values))
    yield from schema_types(_referred(schema.get("$ref"), root), root, depth + 1)
    for part in ("anyOf", "oneOf", "allOf"):
        choices = schema.get(part)
        for choice in choices if isinstance(choices, list) else ():
            yield from schema_types(choice, root, depth + 1)


def _referred(reference: Any, root: Any) -> Any:
    """The definition in ``root`` that a ``$ref`` such as "#/$defs/Place" names, None for others."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found = root
    for key in reference.removeprefix("#/").split("/"):
        if not isinstance(found, dict):
            return None
        found = found.get(key.replace("~1", "/").replace("~0", "~"))
    return found
