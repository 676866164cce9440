"""From the body of ``/v1/responses`` to that of a chat, and from a chat's errors to those of the body."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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
TOOL_KEYS: dict[str, tuple[type[Any], str]] = {
    "name": (str, "a string"),
    "description": (str, "a string"),
    "parameters": (dict, "an object"),
    "strict": (bool, "true or false"),
}
RENAMED = (
    (r"^max_completion_tokens", "max_output_tokens"),
    (r"^response_format(\.json_schema)?", "text.format"),
    (r"^reasoning_effort", "reasoning.effort"),
    (r"^messages", "input"),
    (r"^tool_choice\.function", "tool_choice"),
    (r"^(tools\[\d+\])\.function", r"\1"),
)
"""Beginnings of fields of a chat's body -> fields of this one."""


@contextmanager
def own_names(places: Mapping[str, str]) -> Iterator[None]:
    """Errors about fields of a chat's body name the fields of ``/v1/responses``; ``places``: see :func:`read_input`."""
    try:
        yield
    except RequestError as error:
        if error.param is not None:
            ours = _own_name(error.param, places)
            error.message = error.message.replace(error.param, ours)
            error.param = ours
        raise


def _own_name(field: str, places: Mapping[str, str]) -> str:
    for theirs, ours in places.items():
        if field.startswith(theirs):
            return ours + field.removeprefix(theirs).removeprefix(".function")
    for pattern, replacement in RENAMED:
        field, count = re.subn(pattern, replacement, field)
        if count:
            break
    return field


def chat_body(body: ResponsesBody) -> tuple[ChatBody, dict[str, str]]:
    """The chat that a request stands for, and the places of its messages' calls in the input.

    RequestError for invalid input, tools or formats.
    """
    fields: dict[str, Any] = {name: getattr(body, name) for name in SAME}
    fields["messages"], places = read_input(body.input, body.instructions)
    fields["max_completion_tokens"] = body.max_output_tokens
    fields["tools"] = [_tool(f"tools[{index}]", tool) for index, tool in enumerate(body.tools or [])]
    fields["tool_choice"] = _tool_choice(body.tool_choice)
    fields["response_format"] = None if body.text is None else _format(body.text)
    fields["reasoning_effort"] = None if body.reasoning is None else effort(body.reasoning)
    return msgspec.convert(fields, ChatBody), places


def _tool(place: str, tool: dict[str, Any]) -> dict[str, Any]:
    kind = tool.get("type")
    if kind != "function":
        raise RequestError(
            f"{place}.type must be 'function', got {kind!r:.40}: the server has no built-in tools.",
            param=f"{place}.type",
        )
    function = {"name": None} | {key: tool[key] for key in TOOL_KEYS if tool.get(key) is not None}
    for key, value in function.items():
        expected, name = TOOL_KEYS[key]
        if not isinstance(value, expected):
            raise RequestError(f"{place}.{key} must be {name}.", param=f"{place}.{key}")
    return {"type": "function", "function": function}


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
