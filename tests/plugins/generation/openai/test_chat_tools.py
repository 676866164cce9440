"""Tools and reasoning on ``/v1/chat/completions``, with scripted outputs."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plugins.generation.formats.splitting import joined as joined_pieces
from tests.plugins.generation.openai.requests import USER, chat, chunks_of
from trunkline.core.errors import RequestError
from trunkline.plugins.generation.formats.model_format import ModelFormat, ReplyReader
from trunkline.plugins.generation.grammar.kept import Refusal
from trunkline.plugins.generation.grammar.llguidance_source import Vocabulary
from trunkline.plugins.generation.grammar.worker import answer_of
from trunkline.plugins.generation.openai.grammars import GrammarField
from trunkline.plugins.generation.openai.replies import grammar_errors
from trunkline.plugins.generation.openai.tools import FunctionTool, Tool, read_tools
from trunkline.plugins.generation.sampling.params import SamplingParams
from trunkline.plugins.generation.sequence import OutputSequence

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}:{{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n{% if thinks %}<think>\n{% endif %}"
)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "It rains", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}
CALLS = (
    "<think>\nTwo.\n</think>\n\nYes.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
STOP = {"type": "stop", "matched": "x"}


@pytest.fixture
def engine(make_engine: Any) -> Any:
    return make_engine(context_length=2000)


@pytest.fixture(autouse=True)
def _template(byte_level: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_level, "chat_template", TEMPLATE)


async def message(client: httpx.AsyncClient, **body: Any) -> tuple[dict[str, Any], str]:
    """The message and the finish reason."""
    answer = await chat(client, **body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice["message"], choice["finish_reason"]


async def deltas(client: httpx.AsyncClient, **body: Any) -> tuple[list[dict[str, Any]], str]:
    """The deltas of a stream, and its finish reason."""
    choices = [chunk["choices"][0] for chunk in chunks_of(await chat(client, stream=True, **body))]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    return [choice["delta"] for choice in choices], choices[-1]["finish_reason"]


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of deltas, as OpenAI's does."""
    whole: dict[str, Any] = {"role": "assistant", "content": ""}
    for part in parts:
        for field in ("content", "reasoning_content"):
            if field in part:
                whole[field] = whole.get(field, "") + part[field]
        for call in part.get("tool_calls", []):
            calls = whole.setdefault("tool_calls", [])
            if call["index"] == len(calls):
                assert call["function"]["arguments"] == ""
                calls.append({"id": call["id"], "type": call["type"], "function": {**call["function"]}})
            else:
                assert call.keys() == {"index", "function"}
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return whole


def without_ids(whole: dict[str, Any]) -> dict[str, Any]:
    calls = [{key: value for key, value in call.items() if key != "id"} for call in whole.get("tool_calls", [])]
    return {**whole, "content": whole["content"] or "", "tool_calls": calls}


async def test_a_reply_with_tool_calls(client: httpx.AsyncClient, engine: Any, byte_level: Any) -> None:
    engine.says(CALLS, STOP)
    said, finish = await message(client, tools=[WEATHER, NOW])
    assert finish == "tool_calls"
    assert (said["content"], said["reasoning_content"]) == ("Yes.", "Two.")
    first, second = said["tool_calls"]
    assert (first["type"], first["function"]) == (
        "function",
        {"name": "get_weather", "arguments": '{"city": "Zürich"}'},
    )
    assert second["function"] == {"name": "now", "arguments": "{}"}
    assert first["id"].startswith("call_")
    assert first["id"] != second["id"]
    prompt = byte_level.decode(engine.items[0].prompt)
    assert prompt.startswith(f"<tools>{json.dumps([WEATHER, NOW])}</tools>")


async def test_a_stream_has_the_same_as_the_whole_reply(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says(CALLS, STOP)
    said, _ = await message(client, tools=[WEATHER, NOW])
    parts, finish = await deltas(client, tools=[WEATHER, NOW])
    assert finish == "tool_calls"
    assert without_ids(joined(parts)) == without_ids(said)


async def test_arguments_are_streamed_as_they_come(client: httpx.AsyncClient, engine: Any) -> None:
    engine.with_threads = False
    engine.says('Hm. <tool_call>{"name": "get_weather", "arguments": {"city": "the quick brown fox')
    parts, finish = await deltas(client, tools=[WEATHER])
    streamed = joined(parts)
    [called] = streamed["tool_calls"]
    assert (called["function"]["arguments"], finish) == ('{"city": "the quick brown fox', "length")
    assert sum("tool_calls" in part for part in parts) > 4
    said, _ = await message(client, tools=[WEATHER])
    assert without_ids(said) == without_ids(streamed)


async def test_tokens_of_the_reasoning_are_counted(client: httpx.AsyncClient, engine: Any, byte_level: Any) -> None:
    def count(text: str) -> int:
        return len(byte_level.encode(text, add_special_tokens=False))

    for text, body, expected in (
        ("Yes.", {}, 0),
        ("<think>Hé 🙂.</think>Yes.", {}, count("<think>Hé 🙂.</think>")),
        ("<think>Hé 🙂.</think>Yes.", {"n": 2, "include_reasoning": False}, 2 * count("<think>Hé 🙂.</think>")),
        ("Hm.</think>Yes.", {"chat_template_kwargs": {"thinks": True}}, count("Hm.</think>")),
        ("<think>Hm", {}, count("<think>Hm")),
    ):
        engine.says(text, STOP)
        usage = (await chat(client, **body)).json()["usage"]
        assert usage["completion_tokens_details"] == {"reasoning_tokens": expected}, text
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = chunks_of(await chat(client, **body, stream=True, stream_options=options))
        assert chunks[-1]["usage"] == usage
    answer = (await chat(client, separate_reasoning=False)).json()
    assert "completion_tokens_details" not in answer["usage"]


async def test_only_calls_have_no_content(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says('<tool_call>{"name": "now", "arguments": {}}</tool_call>', STOP)
    assert (await message(client, tools=[NOW]))[0]["content"] is None


async def test_a_cut_call_is_content(client: httpx.AsyncClient, engine: Any) -> None:
    cut = '<tool_call>{"name": "now", "argu'
    engine.says(cut)
    said, finish = await message(client, tools=[NOW])
    assert (said, finish) == ({"role": "assistant", "content": cut}, "length")


async def test_one_call_without_parallel_calls(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says(CALLS, STOP)
    said, _ = await message(client, tools=[WEATHER, NOW], parallel_tool_calls=False)
    assert [call["function"]["name"] for call in said["tool_calls"]] == ["get_weather"]
    parts, _ = await deltas(client, tools=[WEATHER, NOW], parallel_tool_calls=False)
    assert len(joined(parts)["tool_calls"]) == 1


async def test_no_tools_no_calls(client: httpx.AsyncClient, engine: Any, byte_level: Any) -> None:
    engine.says(CALLS, STOP)
    for body in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}):
        said, finish = await message(client, **body)
        assert finish == "stop"
        assert said["reasoning_content"] == "Two."
        assert said["content"] == CALLS.split("</think>\n\n")[1]
        assert "<tools>" not in byte_level.decode(engine.items[-1].prompt)


async def test_reasoning_options(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says("<think>\nHm. So.\n</think>\n\nYes.", STOP)
    assert (await message(client, separate_reasoning=False))[0]["content"] == "<think>\nHm. So.\n</think>\n\nYes."
    assert (await message(client, include_reasoning=False))[0] == {"role": "assistant", "content": "Yes."}
    parts, _ = await deltas(client, include_reasoning=False)
    assert joined(parts) == {"role": "assistant", "content": "Yes."}
    parts, _ = await deltas(client, stream_reasoning=False)
    assert [part["reasoning_content"] for part in parts if "reasoning_content" in part] == ["Hm. So."]


async def test_reasoning_that_the_prompt_begins(client: httpx.AsyncClient, engine: Any) -> None:
    engine.says("Hm.\n</think>\n\nYes.", STOP)
    said, _ = await message(client, chat_template_kwargs={"thinks": True})
    assert (said["reasoning_content"], said["content"]) == ("Hm.", "Yes.")


async def test_log_probabilities_stay_with_the_stream(client: httpx.AsyncClient, engine: Any) -> None:
    engine.with_results = True
    engine.says("<think>a</think>b", STOP)
    choices = [chunk["choices"][0] for chunk in chunks_of(await chat(client, stream=True, logprobs=True))]
    entries = [entry for choice in choices for entry in (choice["logprobs"] or {}).get("content", [])]
    assert len(entries) == len(engine.replies[0].tokens)


async def test_the_history_reaches_the_template(client: httpx.AsyncClient, engine: Any, byte_level: Any) -> None:
    engine.says("a", STOP)
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
    history = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
    ]
    await message(client, messages=history)
    assert 'assistant\n<tool_call>now:{"a": 1}</tool_call>' in byte_level.decode(engine.items[0].prompt)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_forced_calls_have_a_grammar(
    client: httpx.AsyncClient, engine: Any, byte_level: Any, choice: Any
) -> None:
    engine.says('<tool_call>\n{"name": "get_weather", "arguments": {"city": "a"}}\n</tool_call>', STOP)
    _, finish = await message(client, tools=[WEATHER, NOW], tool_choice=choice)
    grammar = engine.items[0].params.grammar
    assert (finish, grammar.kind) == ("tool_calls", "lark")
    assert "thoughts: (" in grammar.text
    assert '"get_weather' not in grammar.text.split("arguments_0:")[1] or choice == "required"
    assert ("call_1" in grammar.text) == (choice == "required")
    assert ("now" in byte_level.decode(engine.items[0].prompt)) == (choice == "required")


async def test_an_answer_by_a_schema_or_a_call(client: httpx.AsyncClient, engine: Any) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    engine.says("{}", STOP)
    said, _ = await message(client, tools=[NOW], response_format=shape)
    assert said["content"] == "{}"
    assert "(calls | answer)" in engine.items[0].params.grammar.text
    await message(client, response_format=shape)
    assert engine.items[-1].params.grammar.kind == "json_schema"
    engine.says("Hm.</think>\n{}", STOP)
    said, _ = await message(client, response_format=shape, chat_template_kwargs={"thinks": True})
    assert (said["reasoning_content"], said["content"]) == ("Hm.", "{}")
    assert engine.items[-1].params.grammar.text.startswith("start: thoughts answer")


async def test_errors_about_schemas_name_the_tool(client: httpx.AsyncClient, engine: Any, byte_level: Any) -> None:
    """The engine refuses the grammar that the server has made; its reason names the field."""
    engine.says("", STOP)
    tools = [NOW, _function(parameters={"type": "object", "properties": {"a": {"not": {}}}})]
    await chat(client, tools=tools, tool_choice="required")
    grammar = engine.items[-1].params.grammar
    tokenizer = Vocabulary(byte_level.backend_tokenizer.to_str(), len(byte_level), (byte_level.eos_token_id,)).load()
    reason = answer_of(grammar, tokenizer).reason
    assert reason == 'tools[1].function.parameters: Unimplemented keys: ["not"]'
    with pytest.raises(RequestError) as caught, grammar_errors(GrammarField("tools", "lark", grammar.text)):
        raise Refusal(reason).error(grammar)
    assert caught.value.message == f"Failed to compile tools grammar: {reason}"
    assert caught.value.param == "tools"


def _function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "must be 'function', got 'web_search'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "Missing required parameter"),
        ({"tools": [_function(name="a b")]}, "tools[0].function.name", "1 to 64 letters"),
        ({"tools": [_function(), _function()]}, "tools[1].function.name", "two tools named f"),
        ({"tools": [_function(parameters={"type": "array"})]}, "tools[0].function.parameters.type", "must be 'object'"),
        (
            {"tools": [_function(parameters={"properties": []})]},
            "tools[0].function.parameters.properties",
            "must be an object of schemas",
        ),
        (
            {"tools": [_function(parameters={"properties": {"a": "string"}})]},
            "tools[0].function.parameters.properties.a",
            "must be a schema",
        ),
        (
            {"tools": [_function(parameters={"required": True})]},
            "tools[0].function.parameters.required",
            "must be a list of names",
        ),
        ({"tools": [NOW], "tool_choice": "any"}, "tool_choice", "Supported values are: 'none', 'auto', 'required'"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [NOW], "tool_choice": {"type": "function"}}, "tool_choice", "must be"),
        (
            {"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice.function.name",
            "isn't the name of a tool",
        ),
        ({"tools": [NOW], "tool_choice": "required", "regex": "a"}, "tool_choice", "regex can't be set"),
        (
            {"tools": [NOW], "tool_choice": "required", "response_format": {"type": "text"}, "regex": "a"},
            *("tool_choice", "regex can't be set"),
        ),
        ({"tools": [NOW], "regex": "a"}, "tools", "regex can't be combined with tools"),
    ],
)
async def test_refused(client: httpx.AsyncClient, body: dict[str, Any], param: str, text: str) -> None:
    answer = await chat(client, **body)
    assert answer.status_code == 400
    assert answer.json()["param"] == param
    assert text in answer.json()["message"]


async def test_a_template_or_format_without_tools(
    client: httpx.AsyncClient, byte_level: Any, monkeypatch: pytest.MonkeyPatch, make_app: Any, engine: Any
) -> None:
    for template, text in (
        ("{{ messages[0].content }}", "start the server with --tool-call-parser hermes"),
        ("{{ messages[0].content }}{{ tools }}", "start the server with --tool-call-parser NAME"),
    ):
        monkeypatch.setattr(byte_level, "chat_template", template)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(engine)), base_url="http://test") as fresh:
            answer = await chat(fresh, tools=[NOW])
        assert (answer.status_code, answer.json()["param"]) == (400, "tools")
        assert text in answer.json()["message"]


def test_a_named_function_is_called_once_unless_asked() -> None:
    tools = [Tool(function=FunctionTool(name)) for name in ("a", "b")]
    named = {"type": "function", "function": {"name": "b"}}
    for parallel, several, once in ((None, True, False), (True, True, True), (False, False, False)):
        for choice, many in (("required", several), (named, once)):
            found = read_tools(tools, choice, parallel=parallel)
            assert (found.forced, found.many) == (True, many)


def test_allowed_tools() -> None:
    tools = [Tool(function=FunctionTool(name)) for name in ("a", "b")]
    listed = [{"type": "function", "function": {"name": "b"}}]
    for mode, forced in (("auto", False), ("required", True)):
        found = read_tools(
            tools, {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": listed}}, parallel=None
        )
        assert ([*found.schemas], found.forced) == (["b"], forced)


@given(cuts=st.lists(st.integers(1, 6), max_size=30))
@settings(max_examples=20)
def test_any_chunks_of_tokens_give_the_same(byte_level: Any, cuts: list[int]) -> None:
    """From the tokens to the pieces, as the routes do it."""
    model = ModelFormat(byte_level, "hermes", "qwen3")
    regions = model.regions(True, True)
    assert regions is not None
    reader = ReplyReader(model, regions, "<|im_start|>assistant\n", {"get_weather": CITY, "now": {}}, {}, many=True)
    ids = byte_level.encode(CALLS + "<|im_end|>", add_special_tokens=False)

    def split(sizes: list[int]) -> list[Any]:
        reply: Any = SimpleNamespace(tokens=[], finish=None, error=None, results=[])
        served: Any = None
        sequence = OutputSequence(reply, [], SamplingParams(), served, byte_level, kept=reader.kept)
        parser, sent, pieces = reader.parser(), 0, []
        for size in (*sizes, len(ids)):
            reply.tokens = ids[: len(reply.tokens) + size]
            reply.finish = {"type": "stop", "matched": ids[-1]} if len(reply.tokens) == len(ids) else None
            sequence.refresh()
            text = sequence.text or ""
            pieces += parser.feed(text[sent:])
            sent = len(text)
        pieces = joined_pieces([*pieces, *parser.finish()])
        kinds = ("content", "reasoning")
        return [
            *("".join(p.text for p in pieces if p.kind == kind) for kind in kinds),
            [p.call for p in pieces if p.call],
        ]

    assert split(cuts) == split([])
    assert len(split([])[2]) == 2
