"""Tools of a model whose chat template takes none, with --tool-call-parser hermes."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.plugins.generation.openai.requests import USER, chat

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
CALLED = {"role": "assistant", "content": "Hm.", "tool_calls": [
    {"id": name, "type": "function", "function": {"name": name, "arguments": '{"é": 1}'}} for name in ("a", "b")
]}  # fmt: skip
RESULTS = [{"role": "tool", "tool_call_id": name, "content": f"from {name}"} for name in ("a", "b")]
FUNCTIONS = [{"name": "get_weather", "description": "It rains", "parameters": {"type": "object"}}, {"name": "now"}]
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]
LISTED = "\n".join(["<tools>", *map(json.dumps, FUNCTIONS), "</tools>"])


@pytest.fixture
def engine(make_engine: Any) -> Any:
    return make_engine(context_length=2000)


@pytest.mark.parametrize("system", [None, "Be brief.", [{"type": "text", "text": "Be brief."}]])
async def test_a_template_without_tools_gets_them_as_text(
    make_app: Any, engine: Any, byte_level: Any, monkeypatch: pytest.MonkeyPatch, system: Any
) -> None:
    monkeypatch.setattr(byte_level, "chat_template", PLAIN)
    engine.says('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', {"type": "stop", "matched": "x"})
    messages = [*([{"role": "system", "content": system}] if system else []), USER, CALLED, *RESULTS]
    app = make_app(engine, tool_call_parser="hermes")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as fresh:
        answer = (await chat(fresh, messages=messages, tools=TOOLS, tool_choice="required")).json()
        await chat(fresh, messages=messages)
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": "{}"}
    with_tools, without = (byte_level.decode(item.prompt) for item in engine.items)
    begin = "<|im_start|>system\n" + ("Be brief.\n\n" if system else "") + "# Functions"
    assert with_tools.startswith(begin)
    assert LISTED in with_tools
    assert '<tool_call>\n{"name": "NAME", "arguments": {"KEY": VALUE}}\n</tool_call>' in with_tools
    calls = "\n".join(f'<tool_call>\n{{"name": "{name}", "arguments": {{"é": 1}}}}\n</tool_call>' for name in "ab")
    results = "\n".join(f"<tool_response>\nfrom {name}\n</tool_response>" for name in "ab")
    end = f"user\nhello<|im_end|>\n<|im_start|>assistant\nHm.\n{calls}<|im_end|>\n<|im_start|>user\n{results}<|im_end|>"
    assert end in with_tools
    assert end in without
    assert "# Functions" not in without
