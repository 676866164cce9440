"""Structural tags: which texts fit."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from trunkline.plugins.generation.grammar.llguidance_source import Vocabulary, build_matcher, source_of
from trunkline.plugins.generation.grammar.structural_tags import lark_of_tags
from trunkline.plugins.generation.schemas import Grammar

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


def tag_of(*structures: tuple[str, Any, str], triggers: list[str], **more: Any) -> str:
    items = [{"begin": begin, "schema": schema, "end": end} for begin, schema, end in structures]
    return json.dumps({"type": "structural_tag", "structures": items, "triggers": triggers} | more)


FUNCTIONS = tag_of(
    ("<function=get>", SCHEMA, "</function>"),
    ("<function=stop>", {"type": "null"}, "</function>"),
    ("<|im_start|>call", True, ""),
    triggers=["<function=", "<|im_start|>"],
)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("", True),
        ("a < b, <func", True),
        ('<function=get>{"x":5}</function>', True),
        ('one <function=get>{"x": 5}</function> two <function=stop>null</function>, done', True),
        ('<function=get>{"x":5}', False),
        ("<function=other>", False),
        ('<function=get>{"x":"s"}</function>', False),
        ('<function=stop>{"x":5}</function>', False),
        ("<|im_start|>call[1]", True),
        ("<|im_start|>user", False),
    ],
)
def test_texts(text: str, fits: bool, byte_level: PreTrainedTokenizerFast) -> None:
    """Free text has no special token but those that are triggers."""
    tokenizer = Vocabulary(byte_level.backend_tokenizer.to_str(), len(byte_level), (byte_level.eos_token_id,)).load()
    matcher = build_matcher(tokenizer, source_of(Grammar("structural_tag", FUNCTIONS), tokenizer))
    ids = byte_level.encode(text, add_special_tokens=False)
    assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) == fits


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "JSON is malformed"),
        ("[]", "Expected `object`, got `array`"),
        ('{"type": "structural_tag", "format": {}}', 'the form with "format" is not supported; send {"type"'),
        (tag_of(triggers=["<"]), "structures must have at least one structure"),
        (tag_of(("a", {}, "b"), triggers=["<"]), "begin 'a' starts with none of the triggers"),
        (tag_of(("a", {}, "b"), triggers=["", "b"]), "begin 'a' starts with none of the triggers"),
        (tag_of(("a", {"x-guidance": {}}, "b"), triggers=["a"]), "#/x-guidance: options"),
        (tag_of(("a", False, "b"), triggers=["a"]), "no value fits the schema false"),
        (tag_of(*[("a", {}, "b")] * 129, triggers=["a"]), "at most 128 structures are allowed, got 129"),
        (tag_of(("a", {}, "b"), triggers=["a"], at_least_one=True), "Object contains unknown field `at_least_one`"),
        (tag_of(("a", 5, "b"), triggers=["a"]), "Expected `bool | object`, got `int`"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        lark_of_tags(text, lambda trigger: False)
    assert str(caught.value).startswith(message)
