"""Detects in which form a chat template takes the tool calls of earlier answers, by rendering a test conversation.

Most templates write the arguments themselves and need an object; some join them to other strings and need JSON text.
Some render calls only in messages without content.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from trunkline.core.types import Tokenizer

from .chat_templates import contents_for_template, template_of
from .deadline import TEMPLATE_SECONDS, TookTooLong, deadline

log = logging.getLogger("trunkline.server")

KEY, VALUE, NAME = "k50273", "v91684", "f36402"  # of the test conversation's call
CALL = {"id": "a12345678", "type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}
CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "b", "tool_call_id": "a12345678", "name": NAME},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {KEY: {"type": "string", "description": ""}}},
    },
}
FORMS = ((False, False), (True, False), (False, True), (True, True))  # (arguments as text, without content), best first

_decided: dict[str, tuple[bool, bool]] = {}  # by template; a server has at most one template per model


def calls_for_template(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their tool calls, whose arguments are objects, in the form that the template needs."""
    template = template_of(tokenizer)
    if template not in _decided:
        _decided[template] = _decide(tokenizer)
    return [_shaped(message, *_decided[template]) for message in messages]


def _decide(tokenizer: Tokenizer) -> tuple[bool, bool]:
    try:
        messages = contents_for_template(tokenizer, CONVERSATION)
        with deadline(TEMPLATE_SECONDS):
            for form in FORMS:
                if _renders(tokenizer, messages, *form):
                    return form
        log.warning("the chat template doesn't show the tool calls of earlier answers to the model")
    except TookTooLong:
        log.warning("a probe of the chat template for tool calls took more than %g s", TEMPLATE_SECONDS)
    return FORMS[0]


def _renders(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], as_text: bool, no_content: bool) -> bool:
    """Whether a call is rendered, with its arguments neither in Python's notation nor as a string in a string."""
    shaped = [_shaped(message, as_text, no_content) for message in messages]
    try:
        text = str(tokenizer.apply_chat_template(shaped, tokenize=False, tools=[TOOL]))
    except TookTooLong:
        raise
    except Exception:  # a template may raise anything
        return False
    return VALUE in text and f"'{KEY}'" not in text and f'\\"{KEY}' not in text


def _shaped(message: dict[str, Any], as_text: bool, no_content: bool) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    if as_text:
        message = {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
    if no_content and not message["content"]:
        return {key: value for key, value in message.items() if key != "content"}
    return message


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
