"""Chooses the formats of a model: those of its checkpoint, those that the user names, or by its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

from msgspec import Struct

from trunkline.core.errors import ConfigError
from trunkline.core.types import Tokenizer

from .reasoning_formats import REASONING_FORMATS, ReasoningFormat
from .templates import ANCHORS, TOOL_FORMATS, ToolFormat

AUTO, NONE = "auto", "none"

F = TypeVar("F", bound=ToolFormat | ReasoningFormat)


class ReplyFormat(Struct, frozen=True, kw_only=True):
    """The format of a model's replies.

    ``reasoning`` and ``calls``: response templates without and with tool calls; None where the model has none.
    ``tool`` and ``thoughts``: the built-in formats, with which calls are forced. ``own``: the templates are the
    checkpoint's, so that their patterns may be slow.
    """

    reasoning: dict[str, Any] | None = None
    calls: dict[str, Any] | None = None
    tool: ToolFormat | None = None
    thoughts: ReasoningFormat | None = None
    own: bool = False

    def template(self, *, tools: bool, reasoning: bool) -> dict[str, Any] | None:
        """The template for a request that has tools or wants its reasoning separated; None = nothing to parse."""
        template = self.calls if tools else self.reasoning if reasoning else None
        if template is None or reasoning:
            return template
        fields = {name: field for name, field in template["fields"].items() if not name.startswith(REASONING)}
        return {**template, "fields": fields}


REASONING = ("reasoning", "thinking")
"""Beginnings of the names of fields with reasoning; some checkpoints' templates call it ``thinking``."""


REST = "content_rest"
"""Name of the field for what is in no message of a format in which content has markers, too."""


def names(formats: Mapping[str, ToolFormat] | Mapping[str, ReasoningFormat]) -> list[str]:
    """All names and aliases, for messages and documents."""
    return [name for key, one in formats.items() for name in (key, *one.aliases)]


def check_names(tool: str, reasoning: str) -> None:
    """ConfigError for values of --tool-call-parser and --reasoning-parser that name no format."""
    for flag, value, formats in (
        ("--tool-call-parser", tool, names(TOOL_FORMATS)),
        ("--reasoning-parser", reasoning, names(REASONING_FORMATS)),
    ):
        if value not in (AUTO, NONE, *formats):
            raise ConfigError(f"{flag} {value!r} is unknown; use auto, none or one of {', '.join(formats)}.")


def reply_format(tokenizer: Tokenizer, template: str, tool: str, reasoning: str) -> ReplyFormat:
    """The format of a model. ``template``: its chat template; ``tool`` and ``reasoning``: values of the flags."""
    own = getattr(tokenizer, "response_template", None)
    if isinstance(own, dict) and tool == AUTO and reasoning == AUTO:
        return _of_checkpoint(own, template)
    return _built_in(template, tool, reasoning)


@lru_cache(maxsize=64)  # more models than one server has
def _built_in(template: str, tool: str, reasoning: str) -> ReplyFormat:
    calls, thoughts = _chosen(TOOL_FORMATS, tool, template), _chosen(REASONING_FORMATS, reasoning, template)
    fields = {} if thoughts is None else {"reasoning_content": thoughts.field}
    parts = {"start_anchor": list(ANCHORS)}
    content: dict[str, Any] = {"content": {"content": "text"}}
    with_calls = None
    if calls is not None:
        text = {"content": "text", **({"close": list(calls.content_close)} if calls.content_close else {})}
        has_markers = "content" in calls.fields
        if has_markers and thoughts is not None:
            content = {REST: text, "content": calls.fields["content"]}
        with_calls = {**parts, "fields": {**fields, (REST if has_markers else "content"): text, **calls.fields}}
    return ReplyFormat(
        reasoning={**parts, "fields": {**fields, **content}} if fields else None,
        calls=with_calls,
        tool=calls,
        thoughts=thoughts,
    )


def _of_checkpoint(own: dict[str, Any], template: str) -> ReplyFormat:
    fields = own.get("fields", {})
    without = {name: field for name, field in fields.items() if not name.startswith("tool_calls")}
    has_reasoning = any(name.startswith(REASONING) for name in fields)
    return ReplyFormat(
        reasoning={**own, "fields": without} if has_reasoning else None,
        calls=own if len(without) < len(fields) else None,
        tool=_chosen(TOOL_FORMATS, AUTO, template),
        thoughts=_chosen(REASONING_FORMATS, AUTO, template) if has_reasoning else None,
        own=True,
    )


def _chosen(formats: Mapping[str, F], name: str, template: str) -> F | None:
    if name == NONE:
        return None
    if name != AUTO:
        return next(one for key, one in formats.items() if name in (key, *one.aliases))
    return next((one for one in formats.values() if _is_detected(one, template)), None)


def _is_detected(one: ToolFormat | ReasoningFormat, template: str) -> bool:
    return one.requires in template and any(mark in template for mark in one.detect)
