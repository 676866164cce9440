"""From chat messages to a prompt, by the model's chat template."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from msgspec import Struct

from trunkline.core.client.truncate import check_characters
from trunkline.core.errors import RequestError
from trunkline.core.types import EngineClient, ServedModel, Tokenizer

from .chat_calls import calls_for_template
from .chat_templates import contents_for_template, template_variables
from .deadline import TEMPLATE_SECONDS, TookTooLong, deadline

SHOWN_ERROR = 500  # characters of a template's error; it may quote the whole chat


class TemplateOptions(Struct, frozen=True):
    """How a chat template is rendered, besides the messages."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = {}
    tools: Sequence[Mapping[str, Any]] = ()


def template_options(
    tokenizer: Tokenizer,
    *,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    variables: Mapping[str, Any] | None,
    effort: str | None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> TemplateOptions:
    """What a request asks of the chat template; ``effort`` is OpenAI's reasoning_effort, ``tools`` are its functions,
    which only some templates take (:func:`takes_tools`).

    RequestError for what contradicts itself or has no effect on it.
    """
    continues = bool(continue_final_message)
    if continues and add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt can't both be true: the answer either continues the "
            "final message or begins a new one.",
            param="continue_final_message",
        )
    given = variables or {}
    for name in given:
        if name in reserved_names(type(tokenizer)):
            raise RequestError(
                f"chat_template_kwargs can't set {name:.40}; messages, add_generation_prompt and "
                "continue_final_message are fields of the request, and the server sets the rest.",
                param="chat_template_kwargs",
            )
    return TemplateOptions(
        add_generation_prompt=not continues if add_generation_prompt is None else add_generation_prompt,
        continue_final_message=continues,
        variables={**_effort(effort, tokenizer), **given},
        tools=tools,
    )


def takes_tools(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's chat template, or the one that it has for tools, reads ``tools``."""
    template: Any = tokenizer.chat_template
    return (isinstance(template, dict) and "tool_use" in template) or "tools" in template_variables(tokenizer)


def _effort(effort: str | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """Template variables for OpenAI's ``reasoning_effort``; "none" also turns the switches off that SGLang does."""
    if effort is None:
        return {}
    if effort == "none":
        return {"reasoning_effort": effort, "enable_thinking": False, "thinking": False}
    if "reasoning_effort" not in template_variables(tokenizer):
        raise RequestError(
            "The model's chat template has no reasoning_effort; leave it out (chat_template_kwargs sets what the "
            "template does have, mostly enable_thinking).",
            param="reasoning_effort",
        )
    return {"reasoning_effort": effort}


@lru_cache(maxsize=64)  # more classes than one server's tokenizers have
def reserved_names(kind: type[Any]) -> frozenset[str]:
    """Variables that requests may not set: the arguments of ``apply_chat_template`` and what it passes on."""
    return frozenset(inspect.signature(kind.apply_chat_template).parameters) | {"messages", "conversations"}


async def chat_prompt(
    engine: EngineClient,
    served: ServedModel,
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, Any]],
    options: TemplateOptions,
) -> str:
    """The prompt of a chat as text; long chats are rendered off the event loop.

    RequestError for more characters than the model's context can hold, and for what :func:`render_chat` refuses.
    """
    size = _count_characters([*messages, options.variables, *options.tools])
    check_characters(size, served.info.context_length)
    text: str = await engine.off_loop(render_chat, tokenizer, messages, served.name, options, size=size)
    return text


def render_chat(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], model: str, options: TemplateOptions) -> str:
    """The prompt. RequestError when the model has no template, or the template raises for these messages."""
    if not tokenizer.chat_template:
        raise RequestError(f"{model} has no chat template; send a text prompt, or start it with --chat-template FILE.")
    shaped = contents_for_template(tokenizer, messages)  # has a time limit of its own
    if any("tool_calls" in message for message in messages):
        shaped = calls_for_template(tokenizer, shaped)
    tools = {"tools": [*options.tools]} if options.tools else {}
    try:
        with deadline(TEMPLATE_SECONDS):
            text: str = tokenizer.apply_chat_template(
                shaped,
                tokenize=False,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                **tools,
                **options.variables,
            )
    except TookTooLong:
        raise RequestError(
            f"The model's chat template took more than {TEMPLATE_SECONDS:g} s; send fewer or shorter messages.",
            param="messages",
        ) from None
    except Exception as error:  # whatever a program may raise
        reason = str(error)[:SHOWN_ERROR]
        raise RequestError(f"The model's chat template refused the messages: {reason}", param="messages") from None
    return text


def _count_characters(value: Any) -> int:
    """Characters of all strings in a value, however they are nested."""
    if isinstance(value, str):
        return len(value)
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return sum(map(_count_characters, inner))
