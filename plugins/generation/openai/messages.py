"""The messages and template options of a chat body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trunkline.core.errors import RequestError
from trunkline.core.server.api import TemplateOptions, read_message, template_options
from trunkline.core.types import Tokenizer

from .chat_schemas import ChatBody, Message

PASSED_ON = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")  # to the template


def read_messages(given: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages whose contents are text or lists of text parts. RequestError names the first that can't be used."""
    if not given:
        raise RequestError("Messages cannot be empty.", param="messages")
    return [_message(index, message) for index, message in enumerate(given)]


def _message(index: int, message: Message) -> dict[str, Any]:
    more = {name: getattr(message, name) for name in PASSED_ON}
    return read_message(index, message.role, message.content, more)


def read_options(body: ChatBody, tokenizer: Tokenizer) -> TemplateOptions:
    """What a request asks of the chat template."""
    return template_options(
        tokenizer,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=body.chat_template_kwargs,
        effort=body.reasoning_effort,
    )
