"""From the body of ``/v1/responses`` to that of a chat, and from a chat's errors to those of the body."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from trunkline.core.errors import RequestError
from trunkline.plugins.generation.openai.chat_schemas import ChatBody

from .read_input import read_input
from .schemas import ReasoningOptions, ResponsesBody, TextOptions

SAME = (
    *("model", "temperature", "top_p", "parallel_tool_calls", "top_k", "min_p", "seed", "stop", "frequency_penalty"),
    *("presence_penalty", "repetition_penalty", "ignore_eos", "chat_template_kwargs", "rid", "priority", "cache_salt"),
)
RENAMED = {
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "messages": "input",
    "tool_choice.function": "tool_choice",
}
"""Fields of a chat's body -> fields of this one; the longer names first."""


@contextmanager
def own_names() -> Iterator[None]:
    """Errors about fields of a chat's body name the fields of ``/v1/responses``."""
    try:
        yield
    except RequestError as error:
        for theirs, ours in RENAMED.items():
            if error.param is not None and error.param.startswith(theirs):
                error.param = ours + error.param.removeprefix(theirs)
                error.message = error.message.replace(theirs, ours)
                break
        raise


def chat_body(body: ResponsesBody) -> ChatBody:
    """The chat that a request stands for. RequestError for invalid input, tools or formats."""
    fields: dict[str, Any] = {name: getattr(body, name) for name in SAME}
    fields["messages"] = read_input(body.input, body.instructions)
    fields["max_completion_tokens"] = body.max_output_tokens
    fields["tools"] = [_tool(f"tools[{index}]", tool) for index, tool in enumerate(body.tools or [])]
    fields["tool_choice"] = _tool_choice(body.tool_choice)
    fields["response_format"] = None if body.text is None else _format(body.text)
    fields["reasoning_effort"] = None if body.reasoning is None else effort(body.reasoning)
    try:
        return msgspec.convert(fields, ChatBody)
    except msgspec.ValidationError as error:
        raise RequestError(f"The request is invalid: {error}") from None


def _tool(place: str, tool: dict[str, Any]) -> dict[str, Any]:
    kind = tool.get("type")
    if kind != "function":
        raise RequestError(
            f"{place}.type must be 'function', got {kind!r:.40}: the server has no built-in tools.",
            param=f"{place}.type",
        )
    if not isinstance(tool.get("name"), str):
        raise RequestError(f"{place}.name must be a string.", param=f"{place}.name")
    keys = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {key: tool[key] for key in keys if tool.get(key) is not None}}


def _tool_choice(choice: str | dict[str, Any] | None) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools":
        listed = choice.get("tools")
        tools = (
            [_tool_choice(tool) if isinstance(tool, dict) else tool for tool in listed]
            if isinstance(listed, list)
            else []
        )
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    return choice


def effort(reasoning: ReasoningOptions) -> str | None:
    """How much the model is asked to reason."""
    return reasoning.effort


def _format(text: TextOptions) -> dict[str, Any] | None:
    value = text.format
    if value is None or value.get("type") != "json_schema":
        return value
    return {"type": "json_schema", "json_schema": {key: value[key] for key in value if key != "type"}}
