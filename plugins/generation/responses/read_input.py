"""From the items of a request to the messages of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trunkline.core.errors import RequestError
from trunkline.plugins.generation.formats.calls import MAX_CALLS

ROLES = {"user": "user", "system": "system", "developer": "system", "assistant": "assistant"}
TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
KINDS = ("message", "function_call", "function_call_output", "reasoning")


def read_input(
    items: str | Sequence[dict[str, Any]], instructions: str | None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Messages as ``/v1/chat/completions`` takes them, and the items of their tool calls: ``messages[1].tool_calls[0]``
    is ``input[2]``. RequestError names the first item that can't be used.

    Neighbouring items of the assistant (reasoning, text, calls) become one message, and so do system messages at the
    beginning.
    """
    places: dict[str, str] = {}
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}], places
    names: dict[str, str] = {}  # of functions, by the id of the call
    for index, item in enumerate(items):
        _add(messages, names, f"input[{index}]", item)
        if calls := messages[-1].get("tool_calls"):
            places.setdefault(f"messages[{len(messages) - 1}].tool_calls[{len(calls) - 1}]", f"input[{index}]")
    if not items:
        raise RequestError("The input has no items; at least one is needed.", param="input")
    return messages, places


def _add(messages: list[dict[str, Any]], names: dict[str, str], place: str, item: dict[str, Any]) -> None:
    kind = item.get("type") or "message"
    if kind == "message":
        _add_message(messages, place, item)
    elif kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        _assistant(messages, "reasoning_content")["reasoning_content"] = _text(f"{place}.content", parts)
    elif kind == "function_call":
        call_id, name, arguments = (_string(place, item, key) for key in ("call_id", "name", "arguments"))
        names[call_id] = name
        function = {"name": name, "arguments": arguments}
        calls = _assistant(messages, "").setdefault("tool_calls", [])
        if len(calls) == MAX_CALLS:
            raise RequestError(f"{place}: an answer has at most {MAX_CALLS} function calls.", param=place)
        calls.append({"id": call_id, "type": "function", "function": function})
    elif kind == "function_call_output":
        call_id = _string(place, item, "call_id")
        if call_id not in names:
            place = f"{place}.call_id"
            raise RequestError(f"{place}: there is no function_call {call_id!r:.80} before it.", param=place)
        content = _text(f"{place}.output", item.get("output"))
        messages.append({"role": "tool", "tool_call_id": call_id, "name": names[call_id], "content": content})
    elif kind == "item_reference":
        raise RequestError(
            f"{place}: the server stores no items; send the item itself in place of its id.", param=place
        )
    else:
        raise RequestError(f"{place}.type must be one of {', '.join(KINDS)}; got {kind!r:.60}.", param=f"{place}.type")


def _add_message(messages: list[dict[str, Any]], place: str, item: dict[str, Any]) -> None:
    role = ROLES.get(_string(place, item, "role"))
    if role is None:
        raise RequestError(f"{place}.role must be one of {', '.join(ROLES)}.", param=f"{place}.role")
    content = _text(f"{place}.content", item.get("content"))
    if role == "assistant":
        _assistant(messages, "content")["content"] = content
    elif role == "system" and messages and all(message["role"] == "system" for message in messages):
        messages[-1]["content"] += f"\n\n{content}"
    else:
        messages.append({"role": role, "content": content})


def _assistant(messages: list[dict[str, Any]], field: str) -> dict[str, Any]:
    """The message that the assistant's next item belongs to: the last one, unless it is complete.

    ``field``: what the item sets; it comes before what the message has already only in a new message.
    """
    order = ("reasoning_content", "content", "tool_calls")
    after = order[order.index(field) :] if field in order else ()
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if last is None or any(name in last for name in after):
        messages.append({"role": "assistant"})
    return messages[-1]


def _text(place: str, content: Any) -> str:
    """The text of a content: a string or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{place} must be a string or a list of text parts.", param=place)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in (*TEXTS, "refusal") or not isinstance(text, str):
            raise RequestError(
                f"{place}[{number}]: only text is supported, got {kind!r:.40}; this server takes no images or files.",
                param=f"{place}[{number}]",
            )
        texts.append(text)
    return "".join(texts)


def _string(place: str, item: dict[str, Any], key: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise RequestError(f"{place}.{key} must be a string.", param=f"{place}.{key}")
    return value
