"""Checks a JSON Schema for what llguidance would ignore, round or take too long for; it refuses the rest itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Not more whitespace than a deep indentation needs: small models may never stop writing it. And no names with escapes
# ("\\u0061"): they would escape the schema of their property.
OPTIONS: JsonCompileOptions = {
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}",
    "json_allowed_escapes": 'nrbtf\\"',
}
_UNWRITABLE = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f]")  # without escapes beyond those

MAX_TEXT = 8192  # characters of a pattern, or of a string that is fixed: the time of each mask grows with them
MAX_INTEGER = 1 << 53  # larger numbers are rounded to float64

# Keywords whose value isn't a schema or a container of schemas, so that names in it are no keywords.
_DATA = ("const", "enum", "default", "examples", "required")
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def checked_schema(text: str) -> dict[str, Any]:
    """The schema. ValueError, with the place in it, for a text that isn't one, or that can't be enforced."""
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON: {error}") from None
    if schema is True:
        schema = {}
    if schema is False:
        raise ValueError("no value fits the schema false")
    if not isinstance(schema, dict):
        raise ValueError("a schema must be an object, true or false")
    for path, part in _schemas("#", schema):
        _check_part(path, part)
    return schema


def _schemas(path: str, schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """All schemas that are objects, with their places, without recursion."""
    pending = [(path, schema)]
    while pending:
        place, part = pending.pop()
        if isinstance(part, list):
            pending += [(f"{place}/{index}", item) for index, item in enumerate(part)]
        if not isinstance(part, dict):
            continue
        yield place, part
        for key, value in part.items():
            if key in _SCHEMAS_BY_NAME and isinstance(value, dict):
                pending += [(f"{place}/{key}/{name}", item) for name, item in value.items()]
            elif key not in _DATA:
                pending.append((f"{place}/{key}", value))


def _check_part(path: str, part: dict[str, Any]) -> None:
    if "x-guidance" in part:
        raise ValueError(f"{path}/x-guidance: options of the grammar engine can't be sent")
    required, minimum = part.get("required", ()), part.get("minProperties", 0)
    if isinstance(minimum, int | float) and minimum > max(1, len(required) if isinstance(required, list) else 0):
        # Further names may be generated twice, and count as one property then.
        raise ValueError(f"{path}/minProperties: more than 1, and more than there are required names, is not supported")
    if isinstance(pattern := part.get("pattern"), str):
        _check_text(f"{path}/pattern", pattern)
    for key in ("properties", "patternProperties", "required"):
        for name in part[key] if isinstance(part.get(key), dict | list) else ():
            if isinstance(name, str):
                _check_text(f"{path}/{key}", name)
    for key in ("const", "enum"):
        _check_values(f"{path}/{key}", part.get(key))


def _check_values(path: str, values: Any) -> None:
    """ValueError for a number or string in a constant that can't be generated exactly."""
    pending = [values]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str):
            _check_text(path, value)
        elif isinstance(value, int) and abs(value) > MAX_INTEGER:
            raise ValueError(f"{path}: integers beyond 2**53 are not supported, got {value}")


def _check_text(path: str, text: str) -> None:
    """ValueError for a pattern, a name or a constant that is too long or can't be written."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"{path}: at most {MAX_TEXT} characters are allowed, got {len(text)}")
    if (found := _UNWRITABLE.search(text)) is not None:
        raise ValueError(f"{path}: the control character U+{ord(found[0]):04X} is not supported")
