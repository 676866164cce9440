"""The messages of a chat: what clients send, and what chat templates get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from trunkline.core.errors import RequestError

from .fields import Refused, Unsupported, UnsupportedMedia
from .nesting import MAX_DEPTH, too_deep

TEMPLATE_FIELDS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
MAX_MESSAGES = 4096
MAX_TEMPLATE_VARIABLES = 64
MAX_TOOL_CALLS = 128  # of one message

TemplateVariables = Annotated[dict[str, Any], Meta(max_length=MAX_TEMPLATE_VARIABLES)]
"""``chat_template_kwargs``: at most 64 variables for the template."""


class CalledFunction(Struct):
    """The function of a tool call. ``arguments``: a JSON object as text, or the object itself."""

    name: str
    arguments: str | dict[str, Any] | None = None


class MessageToolCall(Struct):
    """A tool call of an earlier answer. ``type`` can only be "function"."""

    function: CalledFunction
    id: str | None = None
    type: str | None = None


class ChatMessage(Struct):
    """One message, as OpenAI's API has it. ``read_messages`` checks role and content; TEMPLATE_FIELDS pass unread."""

    role: Any = None
    content: Any = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    tool_calls: Annotated[list[MessageToolCall], Meta(max_length=MAX_TOOL_CALLS)] | None = None
    tools: Unsupported = None
    function_call: Unsupported = None
    audio: UnsupportedMedia = None
    refusal: Annotated[Any, Refused("{field} is not supported; send its text as the content.")] = None


ChatMessages = Annotated[list[ChatMessage], Meta(max_length=MAX_MESSAGES)]
"""``messages`` of a body: at most 4096."""


def read_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages for a chat template; contents are text or lists of text parts, arguments of tool calls are objects.

    RequestError where there are none; otherwise it names the first message that can't be used.
    """
    if not messages:
        raise RequestError("Messages cannot be empty.", param="messages")
    return [_read_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _read_message(place: str, message: ChatMessage) -> dict[str, Any]:
    role, content = message.role, message.content
    if not isinstance(role, str) or not role:
        raise RequestError(f"{place}.role must be a non-empty string.", param=f"{place}.role")
    if isinstance(content, list):
        content = [_read_part(f"{place}.content[{number}]", part) for number, part in enumerate(content)]
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str | list):
        raise RequestError(f"{place}.content must be a string or a list of text parts.", param=f"{place}.content")
    calls = [_read_call(f"{place}.tool_calls[{number}]", call) for number, call in enumerate(message.tool_calls or ())]
    if calls and role != "assistant":
        raise RequestError(f"{place}.tool_calls needs the role assistant.", param=f"{place}.tool_calls")
    others: dict[str, Any] = {name: getattr(message, name) for name in TEMPLATE_FIELDS}
    others["tool_calls"] = calls or None
    return {"role": role, "content": content} | {name: value for name, value in others.items() if value is not None}


def _read_call(place: str, call: MessageToolCall) -> dict[str, Any]:
    if call.type not in (None, "function"):
        raise RequestError(f"{place}.type must be 'function', got {call.type!r:.40}.", param=f"{place}.type")
    identity = {} if call.id is None else {"id": call.id}
    return {**identity, "type": "function", "function": _read_function(f"{place}.function", call.function)}


def _read_function(place: str, function: CalledFunction) -> dict[str, Any]:
    arguments: Any = function.arguments or {}
    field = f"{place}.arguments"
    if isinstance(arguments, str):
        text = arguments.encode()
        if too_deep(text):
            raise RequestError(f"{field} is nested more than {MAX_DEPTH} levels deep.", param=field)
        try:
            arguments = msgspec.json.decode(text)
        except msgspec.DecodeError:
            arguments = None
        if not isinstance(arguments, dict):
            raise RequestError(f"{field} must be a JSON object as text.", param=field)
    return {"name": function.name, "arguments": arguments}


def _read_part(place: str, part: Any) -> dict[str, str]:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise RequestError(f"{place}: only text parts are supported, got {kind!r:.40}.", param=place)
