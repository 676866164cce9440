"""Which schemas are refused: all that llguidance can't enforce, by their keyword."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from trunkline.plugins.generation.grammar.llguidance_source import Vocabulary, build_matcher, source_of
from trunkline.plugins.generation.schemas import Grammar

STRING, INTEGER = {"type": "string"}, {"type": "integer"}


@pytest.fixture(scope="module")
def tokenizer(byte_level: PreTrainedTokenizerFast) -> Any:
    return Vocabulary(byte_level.backend_tokenizer.to_str(), len(byte_level), (byte_level.eos_token_id,)).load()


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": STRING}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"contains": INTEGER}, "contains"),
        ({"minContains": 2}, "minContains"),
        ({"propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"dependentSchemas": {"a": {"required": ["b"]}}}, "dependentSchemas"),
        ({"dependencies": {"a": ["b"]}}, "dependencies"),
        ({"if": STRING, "then": {"minLength": 2}}, '["if", "then"]'),
        ({"type": "object", "unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
        ({"$dynamicRef": "#x"}, "$dynamicRef"),
        ({"properties": {"a": {"properties": {"b": {"not": {}}}}}}, "not"),
        ({"type": "string", "format": "iri"}, "Unknown format: iri"),
        ({"type": "string", "pattern": "^(?=a)"}, "look-around"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"$ref": "http://example.org/schema"}, "http://example.org/schema"),
        ({"$ref": "#/$defs/a"}, "/$defs/a"),
        ({"oneOf": [INTEGER, {"type": "number"}]}, "oneOf is supported only where no value fits two of its schemas"),
        ({"type": "nothing"}, "Invalid type: nothing"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength (5)"),
        ({"enum": []}, "Unsatisfiable"),
        ({"const": 1, "type": "string"}, "Unsatisfiable"),
        (False, "no value fits the schema false"),
        ([], "a schema must be an object, true or false"),
        ("x", "a schema must be an object, true or false"),
        ({"properties": {"a": {"x-guidance": {"lenient": True}}}}, "#/properties/a/x-guidance"),
        ({"items": {"minProperties": 2}}, "#/items/minProperties"),
        ({"anyOf": [{"const": 2**53 + 1}]}, "#/anyOf/0/const: integers beyond 2**53"),
        ({"enum": [{"a": [-(2**60)]}]}, "#/enum: integers beyond"),
        ({"const": "x" * 8193}, "#/const: at most 8192 characters are allowed, got 8193"),
        ({"type": "string", "pattern": "x" * 8193}, "#/pattern: at most 8192 characters"),
        ({"properties": {"x" * 8193: {}}}, "#/properties: at most 8192 characters"),
        ({"const": ["a\x00"]}, "#/const: the control character U+0000 is not supported"),
        ({"required": ["a\x7f"]}, "#/required: the control character U+007F is not supported"),
        ({"type": "object", "maxProperties": 1, "properties": {"a": {}, "b": {}}}, "min/maxProperties only supported"),
    ],
)
def test_refused(schema: Any, named: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        build_matcher(tokenizer, source_of(Grammar("json_schema", json.dumps(schema)), tokenizer))
    assert named in str(caught.value)


@pytest.mark.parametrize("text", ["INVALID", "", "{", '{"a":1}x', "[" * 5000, "nan"])
def test_no_json(text: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="it is not valid JSON: "):
        source_of(Grammar("json_schema", text), tokenizer)


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        ({"properties": {"a": INTEGER}}, '{"b":"x"}', True),
        ({"properties": {"a": INTEGER}}, '{"\\u0061":"x"}', False),  # it would be the property a
        ({"properties": {"a/b": INTEGER}}, '{"a\\/b":"x"}', False),
        ({"properties": {"a\n": INTEGER}}, '{"a\\u000a":"x"}', False),
        ({"properties": {'a\n\t"\\': INTEGER}}, '{"a\\n\\t\\"\\\\":1}', True),
        ({"properties": {"not": INTEGER, "x-guidance": INTEGER}}, '{"not":1,"x-guidance":2}', True),
        ({"enum": [{"x-guidance": 1, "minProperties": 5}]}, '{"x-guidance":1,"minProperties":5}', True),
        ({"type": "object", "minProperties": 2, "required": ["a", "b"]}, '{"a":1,"b":2}', True),
        (True, "[1, null]", True),
        (INTEGER, " 5", False),
        ({"type": "array"}, "[1,{0}2]".replace("{0}", " " * 32), True),
        ({"type": "array"}, "[1,{0}2]".replace("{0}", " " * 33), False),
    ],
)
def test_texts(schema: Any, text: str, fits: bool, tokenizer: Any) -> None:
    matcher = build_matcher(tokenizer, source_of(Grammar("json_schema", json.dumps(schema)), tokenizer))
    ids = tokenizer.tokenize_str(text)
    assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) == fits
