"""Forced tool calls of a live server whose weights are random: all that it says is by the grammar."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest

TEMPLATE = (
    "{{% for t in tools or [] %}}{{{{ t.function.name }}}} {{% endfor %}}"
    "{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n"
    "{{{{ m.content }}}}<|im_end|>\n{{% endfor %}}<|im_start|>assistant\n{{# {mark} #}}"
)
BOUNDED = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Zürich"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NESTED = {
    "type": "object",
    "properties": {
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        "deep": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}},
            "required": ["on"],
            "additionalProperties": False,
        },
    },
    "required": ["tags", "deep"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": BOUNDED, "tag": NESTED}
TOOLS: list[Any] = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in SCHEMAS.items()]
FORMATS = {"hermes": "<tool_call>", "glm45": "<arg_key>"}
MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module", params=FORMATS)
def client(
    request: pytest.FixtureRequest, live: Callable[..., Any], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    file = tmp_path_factory.mktemp("template") / "chat.jinja"
    file.write_text(TEMPLATE.format(mark=FORMATS[request.param]))
    server = live(str(checkpoint), "--chat-template", str(file), "--dtype", "float32")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def check(calls: Any) -> None:
    assert calls
    for call in calls:
        jsonschema_rs.validate(SCHEMAS[call.function.name], json.loads(call.function.arguments))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "tag"}}])
def test_forced_calls_are_valid(client: openai.OpenAI, choice: Any, seed: int) -> None:
    options: Any = {
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "seed": seed,
        "max_tokens": 300,
    }
    told = client.chat.completions.create(model="any", messages=MESSAGES, temperature=1, **options)
    message = told.choices[0].message
    assert (told.choices[0].finish_reason, message.content) == ("tool_calls", None)
    check(message.tool_calls)
    with client.chat.completions.stream(model="any", messages=MESSAGES, temperature=1, **options) as stream:
        streamed = stream.get_final_completion().choices[0].message
    check(streamed.tool_calls)
    functions = [[call.function.to_dict() for call in said.tool_calls or []] for said in (message, streamed)]
    assert functions[0] == [{key: f[key] for key in ("name", "arguments")} for f in functions[1]]


def test_responses_force_calls_and_answers(client: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
    told = client.responses.create(
        model="any", input="hello", tools=tools, tool_choice="required", parallel_tool_calls=False
    )
    [call] = told.output
    assert call.type == "function_call"
    jsonschema_rs.validate(SCHEMAS[call.name], json.loads(call.arguments))
    shape: Any = {"type": "json_schema", "name": "a", "schema": BOUNDED, "strict": True}
    with client.responses.stream(model="any", input="hello", text={"format": shape}) as stream:
        jsonschema_rs.validate(BOUNDED, json.loads(stream.get_final_response().output_text))


def test_an_answer_by_a_schema_or_calls(client: openai.OpenAI) -> None:
    shape: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": NESTED}}
    for seed in range(4):
        message = (
            client.chat.completions.create(
                model="any",
                messages=MESSAGES,
                tools=TOOLS,
                response_format=shape,
                parallel_tool_calls=False,
                seed=seed,
                temperature=1,
            )
            .choices[0]
            .message
        )
        if message.tool_calls:
            check(message.tool_calls)
        else:
            jsonschema_rs.validate(NESTED, json.loads(message.content or ""))


def test_a_schema_that_can_t_be_enforced_is_named(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}}}
    answer = httpx.post(
        f"{client.base_url}chat/completions", json={"messages": MESSAGES, "tools": [tool], "tool_choice": "required"}
    )
    assert answer.status_code == 400
    assert answer.json()["param"].split("[")[0] == "tools"
    assert "tools[0].function.parameters" in answer.json()["message"]
