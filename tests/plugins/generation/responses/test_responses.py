"""``/v1/responses`` with scripted outputs: items and events, and OpenAI's client on a real port."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pydantic
import pytest

from trunkline.core.errors import RequestError

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning_content or '' }}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}:{{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n<think>{# </think> #}"
)
STOP = {"type": "stop", "matched": "x"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "It rains",
    "parameters": CITY,
    "strict": True,
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


@pytest.fixture
def engine(make_engine: Any, byte_level: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(byte_level, "chat_template", TEMPLATE)
    return make_engine(context_length=2000)


async def respond(client: httpx.AsyncClient, given: Any = "hello", **body: Any) -> httpx.Response:
    return await client.post("/v1/responses", json={"input": given, **body})


async def response(client: httpx.AsyncClient, given: Any = "hello", **body: Any) -> dict[str, Any]:
    answer = await respond(client, given, **body)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def events(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    frames = (await respond(client, stream=True, **body)).text.split("\n\n")
    assert frames.pop() == ""
    found = []
    for frame in frames:
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


async def prompt(client: httpx.AsyncClient, engine: Any, byte_level: Any, given: Any, **body: Any) -> str:
    await response(client, given, **body)
    text = byte_level.decode(engine.items[-1].prompt, skip_special_tokens=False)
    return str(text.removesuffix("<|im_start|>assistant\n<think>"))


async def test_a_response(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says("Hm.\n</think>\n\nYes.", STOP)
    told = await response(client, model="any", metadata={"a": "b"}, store=True, temperature=0.5)
    reasoning, said = told["output"]
    assert (reasoning["type"], reasoning["content"]) == ("reasoning", [{"type": "reasoning_text", "text": "Hm."}])
    part = {"type": "output_text", "text": "Yes.", "annotations": [], "logprobs": []}
    assert said == {**said, "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    assert (told["status"], told["object"], told["model"]) == ("completed", "response", "any")
    assert (told["store"], told["metadata"], told["temperature"]) == (False, {"a": "b"}, 0.5)
    counts = told["usage"]
    assert counts["total_tokens"] == counts["input_tokens"] + counts["output_tokens"] > 0
    thoughts = engine.tokenizer("").encode("Hm.\n</think>", add_special_tokens=False)
    assert counts["output_tokens_details"] == {"reasoning_tokens": len(thoughts)}


async def test_a_cut_response_is_incomplete(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says("Hm", {"type": "length", "length": 2})
    told = await response(client, max_output_tokens=7)
    assert engine.items[0].params.max_new_tokens == 7
    assert (told["status"], told["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [(item["type"], item["status"]) for item in told["output"]] == [("reasoning", "incomplete")]


async def test_no_output_is_an_empty_message(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says("", STOP)
    [item] = (await response(client))["output"]
    assert (item["type"], item["content"][0]["text"]) == ("message", "")


async def test_events_in_order(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says(f"Hm.</think>Yes.{CALL}", STOP)
    found = await events(client, tools=[WEATHER])
    kinds = [event["type"].removeprefix("response.") for event in found]
    without_repeats = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    text = lambda kind: ["output_item.added", "content_part.added", f"{kind}.delta", f"{kind}.done"]  # noqa: E731
    ends = ["content_part.done", "output_item.done"]
    calls = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    expected = ["created", "in_progress", *text("reasoning_text"), *ends, *text("output_text"), *ends, *calls]
    assert without_repeats == [*expected, "completed"]
    assert [event["output_index"] for event in found if event["type"].endswith("item.done")] == [0, 1, 2]
    assert found[0]["response"]["output"] == []
    done = [event["item"] for event in found if event["type"].endswith("item.done")]
    assert done == found[-1]["response"]["output"]


async def test_a_stream_has_the_same_as_the_whole_response(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says(f"Hm.\n</think>\nYes. 🙂{CALL}{CALL}", STOP)
    varying = {"id", "call_id", "created_at", "output", "usage"}

    def shape(told: dict[str, Any]) -> Any:
        items = [{key: value for key, value in item.items() if key not in varying} for item in told["output"]]
        return {key: value for key, value in told.items() if key not in varying}, items

    whole, streamed = await response(client, tools=[WEATHER]), await events(client, tools=[WEATHER])
    assert shape(streamed[-1]["response"]) == shape(whole)


async def test_arguments_are_streamed_as_they_come(client: httpx.AsyncClient, engine: Any) -> None:
    engine.with_threads = False
    cut = CALL.removesuffix("}}\n</tool_call>")
    engine.says(f"</think>{cut}", {"type": "length", "length": 9})
    found = await events(client, tools=[WEATHER])
    deltas = [event["delta"] for event in found if event["type"] == "response.function_call_arguments.delta"]
    assert len(deltas) > 2
    [item] = found[-1]["response"]["output"]
    assert (item["arguments"], item["status"]) == ("".join(deltas), "incomplete")
    assert item["arguments"] == '{"city": "Zürich"'
    again = await response(client, tools=[WEATHER])
    assert again["output"][0]["arguments"] == item["arguments"]


async def test_a_failure_in_a_stream_is_an_event(client: httpx.AsyncClient, engine: Any) -> None:
    ids = engine.tokenizer("").encode("Hm", add_special_tokens=False)
    engine.script = lambda item: [*ids, RequestError("it broke", status=500)]
    failed = (await events(client))[-1]
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "it broke"}


async def test_input_items_become_messages(client: httpx.AsyncClient, engine: Any, byte_level: Any) -> None:
    engine.says("a</think>b", STOP)
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "(tool)"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Wait."}]},
        {"type": "function_call", "call_id": "1", "name": "get_weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call", "call_id": "2", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "rain"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "noon"}]},
        {"role": "assistant", "content": "Rain."},
        {"role": "assistant", "content": "Noon."},
    ]
    assert await prompt(client, engine, byte_level, items, instructions="You are kind.") == (
        "<|im_start|>system\nYou are kind.\n\nBe brief.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n"
        '<|im_start|>assistant\n(tool)Wait.<tool_call>get_weather:{"city": "Rome"}</tool_call>'
        "<tool_call>now:{}</tool_call><|im_end|>\n<|im_start|>tool\nrain<|im_end|>\n<|im_start|>tool\nnoon<|im_end|>\n"
        "<|im_start|>assistant\nRain.<|im_end|>\n<|im_start|>assistant\nNoon.<|im_end|>\n"
    )


async def test_the_output_can_be_sent_back(client: httpx.AsyncClient, engine: Any, byte_level: Any) -> None:
    engine.says(f"Hm.</think>Yes.{CALL}", STOP)
    output = (await response(client, tools=[WEATHER]))["output"]
    answer = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": "rain"}
    text = await prompt(client, engine, byte_level, [{"role": "user", "content": "a"}, *output, answer])
    assert 'assistant\nHm.Yes.<tool_call>get_weather:{"city": "Zürich"}</tool_call><|im_end|>' in text


async def test_forced_calls_and_formats(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says(f"Hm.</think>{CALL}", STOP)
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        await response(client, tools=[WEATHER], tool_choice=choice)
        assert engine.items[-1].params.grammar.kind == "lark"
    listed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]}
    await response(client, tools=[WEATHER], tool_choice=listed)
    assert engine.items[-1].params.grammar.kind == "lark"
    shape = {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True}
    await response(client, text={"format": shape})
    assert "answer: %json" in engine.items[-1].params.grammar.text
    await response(client, text={"format": {"type": "text"}})
    assert engine.items[-1].params.grammar is None


FINE = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
IMAGE = {"type": "input_image", "image_url": "https://example.com/a.png"}


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"input": []}, "input", "at least one"),
        ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0]", "takes no images or files"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "stores no items"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type", "must be one of message, function_call"),
        ({"input": [{"role": "robot", "content": "a"}]}, "input[0].role", "must be one of user"),
        ({"input": [{"role": "user"}]}, "input[0].content", "must be a string or a list"),
        (
            {"input": [{"type": "function_call_output", "call_id": "1", "output": "a"}]},
            "input[0].call_id",
            "no function_call '1' before it",
        ),
        (
            {"input": [{"role": "user", "content": "a"}, FINE, {**FINE, "arguments": "{"}], "instructions": "b"},
            *("input[2].arguments", "input[2].arguments must be a JSON object as text"),
        ),
        ({"input": [FINE, {**FINE, "arguments": "[" * 65}]}, "input[1].arguments", "nested more than 64 levels"),
        ({"input": [FINE] * 129}, "input[128]", "at most 128 function calls"),
        ({"input": [{**FINE, "name": None}]}, "input[0].name", "must be a string"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores no responses"),
        ({"conversation": "c"}, "conversation", "stores no responses"),
        ({"background": True}, "background", "stores no responses"),
        ({"prompt": {"id": "p"}}, "prompt", "stores no prompts"),
        ({"truncation": "auto"}, "truncation", "can only be disabled"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "no built-in tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "must be a string"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name", "tools[0].name must have 1 to 64 letters"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1].name", "tools[1].name: there are two"),
        ({"tools": [{**WEATHER, "description": 1}]}, "tools[0].description", "must be a string"),
        ({"tools": [{**WEATHER, "parameters": []}]}, "tools[0].parameters", "must be an object"),
        ({"tools": [{**WEATHER, "parameters": {"type": "array"}}]}, "tools[0].parameters.type", "must be 'object'"),
        ({"tools": [{**WEATHER, "strict": 1}]}, "tools[0].strict", "must be true or false"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "x"}}, "tool_choice", "needs a mode"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name", "isn't the name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice", "must be"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "Supported values"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "'text.format.schema'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be at least 1"),
        ({"max_output_tokens": 5000}, "max_output_tokens", "max_output_tokens is too large"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "has no reasoning.effort"),
    ],
)
async def test_refused(client: httpx.AsyncClient, body: dict[str, Any], param: str, text: str) -> None:
    answer = await respond(client, **({"given": body.pop("input")} if "input" in body else {}), **body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["param"] == param
    assert text in answer.json()["message"]


# -- OpenAI's client -------------------------------------------------------------------------


class Answer(pydantic.BaseModel):
    city: str


async def test_sdk_create(sdk: openai.AsyncOpenAI, engine: Any) -> None:
    engine.says(f"Hm.</think>Yes.{CALL}", STOP)
    told = await sdk.responses.create(model="any", input="hi", tools=[WEATHER])
    assert told.output_text == "Yes."
    assert [item.type for item in told.output] == ["reasoning", "message", "function_call"]


async def test_sdk_stream(sdk: openai.AsyncOpenAI, engine: Any) -> None:
    engine.says(f"Hm.</think>naïve 🙂{CALL}", STOP)
    async with sdk.responses.stream(model="any", input="hi", tools=[WEATHER]) as stream:
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        final = await stream.get_final_response()
    assert text == final.output_text == "naïve 🙂"
    call = final.output[-1]
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "Zürich"}


async def test_sdk_parse(sdk: openai.AsyncOpenAI, engine: Any) -> None:
    engine.says('</think>{"city": "Rome"}', STOP)
    told = await sdk.responses.parse(model="any", input="hi", text_format=Answer)
    assert told.output_parsed == Answer(city="Rome")
    async with sdk.responses.stream(model="any", input="hi", text_format=Answer) as stream:
        final = await stream.get_final_response()
    assert final.output_parsed == Answer(city="Rome")


async def test_sdk_chat_parses_tool_calls(sdk: openai.AsyncOpenAI, engine: Any) -> None:
    class GetWeather(pydantic.BaseModel):
        city: str

    engine.says(f"Hm.</think>{CALL.replace('get_weather', 'GetWeather')}", STOP)
    tools = [openai.pydantic_function_tool(GetWeather)]
    told = await sdk.chat.completions.parse(model="any", messages=[{"role": "user", "content": "hi"}], tools=tools)
    [call] = told.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == GetWeather(city="Zürich")
    stream = sdk.chat.completions.stream(model="any", messages=[{"role": "user", "content": "hi"}], tools=tools)
    async with stream as opened:
        [call] = (await opened.get_final_completion()).choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == GetWeather(city="Zürich")
