"""Chat messages: checked, flattened, and turned into a prompt by the model's chat template."""

from __future__ import annotations

from typing import Any

from trunkline.core.errors import RequestError
from trunkline.core.types import Tokenizer

from .deadline import TookTooLong, deadline

MAX_MESSAGES = 4096
TEMPLATE_SECONDS = 5.0  # templates are programs of the checkpoint's author, fed with what clients send


def read_messages(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with plain text contents. RequestError names the first that can't be used."""
    if not given:
        raise RequestError("Messages cannot be empty.", param="messages")
    if len(given) > MAX_MESSAGES:
        raise RequestError(f"At most {MAX_MESSAGES} messages are allowed, got {len(given)}.", param="messages")
    return [_message(index, message) for index, message in enumerate(given)]


def _message(index: int, message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"messages[{index}].role must be a non-empty string.", param="messages")
    if message.get("tool_calls") or message.get("function_call"):
        raise RequestError(f"messages[{index}].tool_calls: tool calls are not supported yet.", param="messages")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(index, part) for part in content)
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise RequestError(f"messages[{index}].content must be a string or a list of text parts.", param="messages")
    name = message.get("name")
    return {"role": role, "content": content} | ({"name": name} if isinstance(name, str) else {})


def _part(index: int, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise RequestError(f"messages[{index}].content: only text parts are supported, got {kind!r:.40}.", param="messages")


def characters(value: Any) -> int:
    """Characters of all strings in messages, however they are nested."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(characters, inner))


def render(tokenizer: Tokenizer, messages: list[dict[str, Any]], model: str) -> str:
    """The prompt. RequestError when the model has no template, or its template can't or won't do these messages."""
    if not tokenizer.chat_template:
        raise RequestError(f"{model} has no chat template; use /generate, or start it with --chat-template FILE.")
    try:
        with deadline(TEMPLATE_SECONDS):
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TookTooLong:
        raise RequestError(
            f"The model's chat template took more than {TEMPLATE_SECONDS:g} s; send fewer or shorter messages.",
            param="messages",
        ) from None
    except Exception as error:  # whatever a program may raise
        raise RequestError(f"The model's chat template refused the messages: {error}", param="messages") from None
    return text
