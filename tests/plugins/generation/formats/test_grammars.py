"""Outputs that a forced call's grammar allows are parsed to calls that are valid for the tools' schemas."""

from __future__ import annotations

import random
from typing import Any

import jsonschema_rs
import llguidance.hf
import msgspec
import numpy as np
import pytest
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from tests.plugins.generation.formats.splitting import make_form, make_parser, split
from trunkline.core.errors import RequestError
from trunkline.plugins.generation.formats.grammars import forced_answer, forced_calls
from trunkline.plugins.generation.formats.templates import TOOL_FORMATS

PLAIN = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "a place"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "units": {"enum": ["C", "F"]},
        "where": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
        "tags": {"type": ["array", "null"], "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"tag": {"enum": ["a", "b"]}},
}
NESTED = {"type": "object", "properties": {"q": {"type": "string", "pattern": "^[a-c]{2,3}$"}}, "required": ["q"]}
ENDS = ['"', "}", "]", "<", "/", "\n"]  # characters that end texts


def forced(form: Any, tools: dict[str, Any], special: dict[str, int], **options: Any) -> str:
    """The grammar for calls of tools that are all in the request."""
    fields = {name: f"tools[{index}].function.parameters" for index, name in enumerate(tools)}
    return forced_calls(form, tools, special, fields=fields, **options)


def _sample(grammar: str, tokenizer: Any, seed: int) -> str:
    """A random text of the grammar; after some tokens it goes to an end."""
    chooser, table = random.Random(seed), llguidance.hf.from_tokenizer(tokenizer)
    matcher = LLMatcher(table, LLMatcher.grammar_from_lark(grammar))
    assert not matcher.is_error(), matcher.get_error()
    mask, tokens = allocate_token_bitmask(1, table.vocab_size), []
    ends = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(end)[0]) for end in ENDS]
    while not matcher.is_stopped():
        fill_next_token_bitmask(matcher, mask)
        allowed = np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little")).tolist()
        if len(tokens) > 40 and tokenizer.eos_token_id in allowed:
            break
        preferred = [token for token in ends if token in allowed] if len(tokens) > 40 else []
        token = chooser.choice(preferred or allowed)
        assert matcher.consume_token(token)
        tokens.append(token)
        assert len(tokens) < 4000
    return str(tokenizer.decode([token for token in tokens if token != tokenizer.eos_token_id]))


def _calls(form: Any, prompt: str, text: str, schemas: Any) -> list[Any]:
    pieces = split(form, prompt, [text], schemas)
    assert {piece.kind for piece in pieces} <= {"call", "reasoning"}, (text, pieces)
    return [piece.call for piece in pieces if piece.call]


@pytest.mark.parametrize("tool", TOOL_FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_forced_calls_are_valid(tool: str, seed: int, byte_level: Any) -> None:
    schemas = {"get_weather": PLAIN, "now": {"type": "object", "properties": {}, "additionalProperties": False}}
    if TOOL_FORMATS[tool].values == "json":
        schemas["nested"] = NESTED
    form = make_form(tool)
    text = _sample(forced(form, schemas, {}, many=True, in_reasoning=False), byte_level, seed)
    calls = _calls(form, "", text, schemas)
    assert 1 <= len(calls) <= 16
    for call in calls:
        jsonschema_rs.validate(schemas[call.name], msgspec.json.decode(call.arguments))


@pytest.mark.parametrize(
    ("tool", "reasoning", "prompt"),
    [
        ("hermes", "qwen3", "<|im_start|>assistant\n<think>\n"),
        ("hermes", "qwen3", "<|im_start|>assistant\n"),
        ("gpt-oss", "gpt-oss", "<|start|>assistant"),
        ("mistral", "mistral", "[/INST]"),
        ("gemma4", "gemma4", "<|turn>model\n"),
        ("deepseekv3", "deepseek-r1", "<｜Assistant｜>"),
    ],
)
def test_reasoning_may_come_first(tool: str, reasoning: str, prompt: str, byte_level: Any) -> None:
    form, schemas = make_form(tool, reasoning), {"get_weather": PLAIN}
    opened = make_parser(form, prompt, schemas).in_reasoning
    assert opened == ("<think>" in prompt or reasoning == "deepseek-r1")
    grammar = forced(form, schemas, {}, many=False, in_reasoning=opened)
    call = form.tool.begin + form.tool.call.format(name="get_weather", arguments="{}").split("{}")[0]
    begin, end = form.thoughts.text
    matcher = LLMatcher(table := llguidance.hf.from_tokenizer(byte_level), LLMatcher.grammar_from_lark(grammar))
    text = ("" if opened else begin) + "It rains <b>." + end + call
    for token in table.tokenize_str(text):
        assert matcher.consume_token(token), text


def test_one_call_is_forced_without_parallel_calls(byte_level: Any) -> None:
    form, schemas = make_form("hermes"), {"now": {"type": "object", "properties": {}, "additionalProperties": False}}
    text = _sample(forced(form, schemas, {}, many=False, in_reasoning=False), byte_level, 0)
    assert text == '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def test_special_tokens_are_written_as_such() -> None:
    grammar = forced(make_form("mistral"), {"f": {}}, {"[TOOL_CALLS]": 5, "[ARGS]": 7}, many=True, in_reasoning=False)
    assert 'call_0: <[5]> "f" <[7]> arguments_0' in grammar


@pytest.mark.parametrize(
    ("schema", "place", "named"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "x"}}}, ".properties.a", "pattern"),
        ({"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}, ".properties.a", "anyOf"),
        ({"properties": {"a": {"enum": ["x"], "minLength": 1}}}, ".properties.a", "minLength"),
        ({"properties": {"a": {"type": ["string", "null"]}}}, ".properties.a", "type"),
        ({"oneOf": []}, "", "oneOf"),
        ({"required": ["a"]}, ".required", "a"),
        ({"properties": {"a": {"enum": ["x", "</arg_value>"]}}}, ".properties.a", "the value '</arg_value>'"),
        ({"properties": {"a": {"enum": ["x"], "const": "x"}}}, ".properties.a", "enum"),
        ({"properties": {"a<": {"type": "string"}}}, ".properties", "the name a<"),
    ],
)
def test_what_a_format_can_t_enforce_is_named(schema: dict[str, Any], place: str, named: str) -> None:
    with pytest.raises(RequestError, match=f"the call format of this model can't enforce {named};") as caught:
        forced(make_form("glm45"), {"e": {}, "f": schema}, {}, many=True, in_reasoning=False)
    assert caught.value.param == f"tools[1].function.parameters{place}"
    assert caught.value.message.startswith(f"{caught.value.param}: ")


def test_an_unknown_format_forces_nothing() -> None:
    with pytest.raises(RequestError, match="the syntax of this model's tool calls isn't known") as caught:
        forced(make_form("none"), {"f": {}}, {}, many=True, in_reasoning=False)
    assert caught.value.param == "tool_choice"


@pytest.mark.parametrize("tool", ["hermes", "glm45"])
def test_schemas_that_can_t_be_enforced_are_named(tool: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "x-guidance": {}}}}
    with pytest.raises(
        RequestError, match=r"tools\[0\].function.parameters.*: the JSON Schema can't be enforced: .*x-guidance"
    ):
        forced(make_form(tool), {"f": schema}, {}, many=True, in_reasoning=False)
    with pytest.raises(RequestError, match="response_format: the JSON Schema can't be enforced") as caught:
        forced_answer('{"x-guidance": {}}', make_form(tool), {}, in_reasoning=True)
    assert caught.value.param == "response_format"
