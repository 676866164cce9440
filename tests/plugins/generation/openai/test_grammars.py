"""The fields that constrain the output, of OpenAI, SGLang and vLLM, as the sampling parameters of a grammar."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import msgspec
import pytest

from trunkline.core.errors import RequestError
from trunkline.plugins.generation import service
from trunkline.plugins.generation.openai.chat_schemas import ChatBody
from trunkline.plugins.generation.openai.completion_schemas import CompletionBody
from trunkline.plugins.generation.openai.grammars import ANY_OBJECT, read_grammar

SCHEMA = {"type": "object", "properties": {"naïve": {"type": "integer"}}, "required": ["naïve"]}
TEXT = '{"type":"object","properties":{"naïve":{"type":"integer"}},"required":["naïve"]}'
NAMED = {"name": "it", "schema": SCHEMA, "strict": True}
TAG = {"type": "structural_tag", "structures": [], "triggers": []}
BODIES: list[tuple[type[Any], dict[str, Any]]] = [
    (ChatBody, {"messages": [{"role": "user", "content": "hello"}]}),
    (CompletionBody, {"prompt": "hello"}),
]


def read(schema: type[Any], required: dict[str, Any], fields: dict[str, Any]) -> Any:
    return read_grammar(msgspec.convert(required | fields, schema))


@pytest.mark.parametrize(("schema", "required"), BODIES)
@pytest.mark.parametrize(
    ("fields", "field", "key", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", "json_schema", ANY_OBJECT),
        ({"response_format": {"type": "json_object", "value": SCHEMA}}, "response_format", "json_schema", TEXT),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format", "json_schema", TEXT),
        ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, "response_format", "json_schema", TEXT),
        (
            {"response_format": {"type": "json_schema", "json_schema": NAMED | {"strict": None}}},
            *("response_format", "json_schema", TEXT),
        ),
        (
            {"response_format": TAG},
            *("response_format", "structural_tag", '{"type":"structural_tag","structures":[],"triggers":[]}'),
        ),
        ({"regex": "a+"}, "regex", "regex", "a+"),
        ({"ebnf": "root ::= 'a'"}, "ebnf", "ebnf", "root ::= 'a'"),
        ({"json_schema": TEXT}, "json_schema", "json_schema", TEXT),
        ({"json_schema": SCHEMA}, "json_schema", "json_schema", TEXT),
        ({"structural_tag": "{}"}, "structural_tag", "structural_tag", "{}"),
        ({"guided_json": SCHEMA}, "guided_json", "json_schema", TEXT),
        ({"guided_json": TEXT}, "guided_json", "json_schema", TEXT),
        ({"guided_regex": "a+"}, "guided_regex", "regex", "a+"),
        ({"guided_choice": ["a", "b.c"]}, "guided_choice", "regex", r"(a|b\.c)"),
        ({"guided_grammar": "x"}, "guided_grammar", "ebnf", "x"),
        ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs.json", "json_schema", TEXT),
        ({"structured_outputs": {"json": TEXT, "regex": None}}, "structured_outputs.json", "json_schema", TEXT),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex", "regex", "a"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice", "regex", "(a)"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar", "ebnf", "x"),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs.json_object", "json_schema", ANY_OBJECT),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            *("structured_outputs.structural_tag", "structural_tag", "{}"),
        ),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": False}},
            *("structured_outputs.regex", "regex", "a"),
        ),
    ],
)
def test_grammars(
    schema: type[Any], required: dict[str, Any], fields: dict[str, Any], field: str, key: str, text: str
) -> None:
    assert read(schema, required, fields) == (field, key, text)


@pytest.mark.parametrize(("schema", "required"), BODIES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None, "regex": "", "ebnf": "", "json_schema": "", "guided_choice": []},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None, "json_object": False, "whitespace_pattern": None}},
    ],
)
def test_no_grammar(schema: type[Any], required: dict[str, Any], fields: dict[str, Any]) -> None:
    assert read(schema, required, fields) is None


def of_schema(**changes: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": NAMED | changes}}


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"response_format": {}}, "Missing required parameter: 'response_format.type'.", "response_format.type"),
        (
            {"response_format": {"type": "xml"}},
            "Invalid value: 'xml'. Supported values are: 'text', 'json_object', 'json_schema', and 'structural_tag'.",
            "response_format.type",
        ),
        (
            {"response_format": {"type": "json_object", "value": "{}"}},
            *("Invalid type for 'response_format.value': expected an object.", "response_format.value"),
        ),
        (
            {"response_format": {"type": "json_schema"}},
            *("Missing required parameter: 'response_format.json_schema'.", "response_format.json_schema"),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": 5}},
            *("Invalid type for 'response_format.json_schema': expected an object.", "response_format.json_schema"),
        ),
        (
            of_schema(name=None),
            *("Missing required parameter: 'response_format.json_schema.name'.", "response_format.json_schema.name"),
        ),
        (
            of_schema(name=5),
            "Invalid type for 'response_format.json_schema.name': expected a string.",
            "response_format.json_schema.name",
        ),
        (
            of_schema(schema=None),
            "Missing required parameter: 'response_format.json_schema.schema'.",
            "response_format.json_schema.schema",
        ),
        (
            of_schema(schema="{}"),
            "Invalid type for 'response_format.json_schema.schema': expected an object.",
            "response_format.json_schema.schema",
        ),
        (
            of_schema(strict="yes"),
            "Invalid type for 'response_format.json_schema.strict': expected true, false or null.",
            "response_format.json_schema.strict",
        ),
        (
            of_schema() | {"regex": "a"},
            "Only one grammar can be set; the request has regex and response_format.",
            "response_format",
        ),
        (
            {"structured_outputs": {"regex": "a", "grammar": "b"}},
            "Only one grammar can be set; the request has structured_outputs.regex and structured_outputs.grammar.",
            "structured_outputs.grammar",
        ),
        (
            {"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace is not supported; leave it out or set it to null.",
            "structured_outputs.disable_any_whitespace",
        ),
        (
            {"structured_outputs": {"regex": 5}},
            "structured_outputs.regex must be a string.",
            "structured_outputs.regex",
        ),
        (
            {"structured_outputs": {"json": [1]}},
            "structured_outputs.json must be an object or its JSON text.",
            "structured_outputs.json",
        ),
        (
            {"structured_outputs": {"choice": ["a", ""]}},
            "structured_outputs.choice must be a list of texts that aren't empty.",
            "structured_outputs.choice",
        ),
        ({"guided_choice": [""]}, "guided_choice must be a list of texts that aren't empty.", "guided_choice"),
    ],
)
def test_invalid(fields: dict[str, Any], message: str, param: str) -> None:
    with pytest.raises(RequestError) as error:
        read(*BODIES[0], fields)
    assert (error.value.message, error.value.param) == (message, param)


def test_choices_are_literal() -> None:
    choices = ["a.b", "[x]", "1+1=2", "a|b", "(", "\\", "^$", "{2}", "-", "naïve 🙂"]
    grammar = read(*BODIES[0], {"guided_choice": choices})
    assert all(re.fullmatch(grammar.text, choice) for choice in choices)
    assert not re.fullmatch(grammar.text, "aXb")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_grammar_reaches_the_engine(client: httpx.AsyncClient, engine: Any, path: str) -> None:
    body = {"prompt": "hello"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hello"}]}
    assert (await client.post(path, json=body | of_schema())).status_code == 200
    assert (engine.items[-1].params.grammar.kind, engine.items[-1].params.grammar.text) == ("json_schema", TEXT)
    assert (await client.post(path, json=body)).status_code == 200
    assert engine.items[-1].params.grammar is None


async def test_a_stream_whose_grammar_is_invalid_has_the_status(client: httpx.AsyncClient, engine: Any) -> None:
    """And none of its sequences goes on."""
    refusal = RequestError("Failed to compile regex grammar: unclosed group", param="regex")
    engine.script = lambda item: [refusal] if item.rid.endswith("_1") else [50] * 20
    body = {"prompt": [5], "n": 2, "stream": True, "max_tokens": 20}
    answer = await client.post("/v1/completions", json=body | {"guided_regex": "("})
    assert (answer.status_code, answer.json()["param"]) == (400, "guided_regex")
    assert all(reply.finish or reply.error for reply in engine.replies)
    assert (await client.post("/v1/completions", json=body)).status_code == 200, "without a grammar, nothing waits"


async def test_a_stream_waits_for_its_grammar_only_for_a_moment(
    client: httpx.AsyncClient, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(self: Any) -> None:
        await asyncio.Event().wait()

    await client.post("/v1/completions", json={"prompt": [5], "max_tokens": 1})
    monkeypatch.setattr(service, "GRAMMAR_SECONDS", 0.01)
    monkeypatch.setattr(type(engine.replies[0]), "begun", never)
    body = {"prompt": [5], "stream": True, "max_tokens": 2, "regex": "a+"}
    async with asyncio.timeout(30):
        answer = await client.post("/v1/completions", json=body)
    assert (answer.status_code, answer.text.count("[DONE]")) == (200, 1)


async def test_an_error_names_the_field_that_was_sent(client: httpx.AsyncClient) -> None:
    body = {"prompt": "hello", "guided_regex": "a" * 200_000}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert answer["param"] == "guided_regex"
    assert answer["message"].startswith("guided_regex may have at most")


async def test_a_grammar_replaces_the_server_s_preferred_one(engine: Any, make_app: Any) -> None:
    app = make_app(engine, preferred_sampling_params='{"regex": "a+"}')
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for fields in ({}, of_schema()):
            answer = await client.post("/v1/completions", json={"prompt": "hello"} | fields)
            assert answer.status_code == 200, answer.text
    assert [item.params.grammar.kind for item in engine.items] == ["regex", "json_schema"]
