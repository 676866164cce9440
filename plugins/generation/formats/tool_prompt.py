"""Tools, calls and their results as text of a chat, for chat templates that take no tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .templates import ToolFormat

EXPLANATION = """\
# Functions

You can call these functions. Each line has the name, the purpose and the parameters (a JSON Schema) of one:
<tools>
{tools}
</tools>

To call a function, answer with its name and its arguments as JSON, in this form, once for each call:
{call}
The results are sent to you between <tool_response> and </tool_response>."""


def as_text(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], form: ToolFormat
) -> list[dict[str, Any]]:
    """The messages with ``tools`` explained in the system message, and earlier calls and their results as text."""
    shaped: list[dict[str, Any]] = []
    if tools:
        shaped.append({"role": "system", "content": _explanation(tools, form)})
    for index, message in enumerate(messages):
        if index == 0 and tools and message["role"] == "system":
            content = f"{_text(message)}\n\n{shaped[0]['content']}"
            shaped[0] = {**message, "content": content}
        elif message["role"] == "tool":
            _add_result(shaped, f"<tool_response>\n{_text(message)}\n</tool_response>", messages[index - 1])
        elif "tool_calls" in message:
            calls = form.separator.join(_call(call["function"], form) for call in message["tool_calls"])
            others = {key: value for key, value in message.items() if key != "tool_calls"}
            shaped.append({**others, "content": "\n".join(filter(None, (_text(message), calls)))})
        else:
            shaped.append(message)
    return shaped


def _explanation(tools: Sequence[dict[str, Any]], form: ToolFormat) -> str:
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    call = form.call.format(name="NAME", arguments='{"KEY": VALUE}')
    return EXPLANATION.format(tools=lines, call=call)


def _add_result(shaped: list[dict[str, Any]], result: str, before: dict[str, Any]) -> None:
    """Add the result of a call as a message of the user; results after each other are one message."""
    if before["role"] == "tool" and shaped:
        shaped[-1]["content"] += f"\n{result}"
    else:
        shaped.append({"role": "user", "content": result})


def _call(function: dict[str, Any], form: ToolFormat) -> str:
    return form.call.format(name=function["name"], arguments=json.dumps(function["arguments"], ensure_ascii=False))


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
