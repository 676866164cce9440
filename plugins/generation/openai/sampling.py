"""From the fields of a body to sampling parameters."""

from __future__ import annotations

from typing import Any

from trunkline.core.errors import RequestError
from trunkline.core.types import ServedModel
from trunkline.plugins.generation.sampling.checks import GRAMMARS
from trunkline.plugins.generation.sampling.params import NO_LIMIT, SamplingParams
from trunkline.plugins.generation.service import Service

from .body_schemas import SAMPLING
from .chat_schemas import ChatBody
from .completion_schemas import CompletionBody
from .grammars import read_grammar


def sampling_params(
    service: Service, served: ServedModel, body: ChatBody | CompletionBody, defaults: dict[str, Any]
) -> tuple[SamplingParams, str]:
    """The sampling parameters, and the field of the body that has the limit on tokens.

    The body's values override the server's preferred parameters, which override ``defaults``. Errors have the names
    of the body's fields.
    """
    requested: dict[str, Any] = {}
    names = {"max_new_tokens": "max_completion_tokens" if isinstance(body, ChatBody) else "max_tokens"}
    for field, key in SAMPLING.items():
        if (value := getattr(body, field)) is not None:
            requested[key], names[key] = value, field
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:  # the newer name wins
        requested["max_new_tokens"], names["max_new_tokens"] = body.max_completion_tokens, "max_completion_tokens"
    preferred = service.preferred.get(served)
    if (grammar := read_grammar(body)) is not None:
        preferred = {key: value for key, value in preferred.items() if key not in GRAMMARS}
        requested[grammar.key], names[grammar.key] = grammar.text, grammar.field
    limit_field = names["max_new_tokens"]
    least = 0 if isinstance(body, CompletionBody) and body.echo else 1
    if (limit := requested.get("max_new_tokens")) is not None and limit < least:
        if limit != NO_LIMIT:
            with_echo = " (0 with echo)" if isinstance(body, CompletionBody) and not body.echo else ""
            raise RequestError(
                f"{limit_field} must be at least {least}{with_echo}, or -1 for no limit; got {limit}.",
                param=limit_field,
            )
        requested["max_new_tokens"] = None
    merged = {**defaults, **preferred, **requested}
    return service.sampling_params(served, merged, names), limit_field


def check_total(length: int, params: SamplingParams, served: ServedModel, field: str, what: str) -> None:
    """RequestError if a prompt of ``length`` tokens and the limit that the request sets exceed the context length.

    ``field`` has the limit, ``what`` the prompt.
    """
    context, max_tokens = served.info.context_length, params.max_new_tokens
    if max_tokens is not None and length + max_tokens > context:
        raise RequestError(
            f"{field} is too large: {max_tokens}. This model's maximum context length is {context} tokens "
            f"and your {what} {length} tokens.",
            param=field,
        )
