"""Arguments of formats without types get those of the tool's schema."""

from __future__ import annotations

from typing import Any

import pytest

from trunkline.plugins.generation.formats.calls import schema_types, with_types

DEFINITIONS = {
    "Place": {"type": "object", "properties": {"x": {"type": "integer"}}},
    "Level": {"enum": [1, 2]},
    "a/b": {"type": "number"},
    "Loop": {"$ref": "#/$defs/Loop"},
}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "integer"}, "5", 5),
        ({"type": "string"}, "5", "5"),
        ({"$ref": "#/$defs/Place"}, '{"x": 1}', {"x": 1}),
        ({"anyOf": [{"$ref": "#/$defs/Place"}, {"type": "null"}]}, "null", None),
        ({"allOf": [{"$ref": "#/$defs/Level"}]}, "2", 2),
        ({"$ref": "#/$defs/a~1b"}, "1.5", 1.5),
        ({"$ref": "#/$defs/missing"}, "5", "5"),
        ({"$ref": "#/$defs/Loop"}, "5", "5"),
        ({"$ref": 5}, "5", "5"),
        ({"anyOf": 5, "type": ["integer", {}]}, "5", 5),
        (True, "5", "5"),
    ],
)
def test_types(schema: Any, text: str, value: Any) -> None:
    root = {"properties": {"p": schema}, "$defs": DEFINITIONS}
    found = with_types({"p": text}, root)["p"]
    assert (found, type(found)) == (value, type(value))


def test_references_without_end() -> None:
    union = {"anyOf": [{"$ref": "#"}, {"type": "null"}]}
    assert set(schema_types(union, union)) == {"null"}
