"""Loads response templates for transformers' parser, with limits on the time of their patterns.

The parser splits the output into regions. Here every region is loaded as plain text, so that the parser itself raises
no error for invalid contents; :meth:`Regions.value` has transformers parse a region's text afterwards, within limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import regex
from msgspec import Struct

from trunkline.core.errors import ConfigError

from .closing import Closing, value_beginning
from .patterns import BoundedPattern

MAX_REGION = 1 << 20  # characters of a region that is parsed; a longer one is left as text


class Region(Struct, frozen=True):
    """What is known at a region's end: its opening marker and the text after it."""

    opened: str
    body: str


class Regions:
    """A response template, ready for transformers' parser. ConfigError if it is invalid.

    ``spec``: what the parser gets. ``fields``: the original fields, as transformers loaded them.
    """

    def __init__(self, template: dict[str, Any]) -> None:
        load = _loader()
        self.template = template
        try:
            self.fields: dict[str, Any] = load(template).fields
            self.spec: Any = load(_as_text(template))
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"The model's response_template is invalid: {error}") from None
        for field in self.spec.fields.values():
            for name in ("open_re", "close_re"):
                if (pattern := getattr(field, name)) is not None:
                    setattr(field, name, BoundedPattern(pattern))
        self._anchor = BoundedPattern(self.spec.start_anchor_re)

    def parser(self) -> Any:
        """A new parser of transformers, at the beginning of a message, whose events have positions in its text."""
        fields = {name: replace(field, close_re=self._closing(name)) for name, field in self.spec.fields.items()}
        return _parser_class()(replace(self.spec, fields=fields), prefix="")

    def _closing(self, name: str) -> BoundedPattern | Closing | None:
        """What finds the end of a region: for tool calls that have JSON, not in a string."""
        pattern: BoundedPattern | None = self.spec.fields[name].close_re
        field = self.fields[name]
        if pattern is None or '"' in pattern.pattern or not name.startswith("tool_calls"):
            return pattern
        if field.content == "json":
            return Closing(pattern, delimiters=field.content_args.get("string_delims", ()))
        value = value_beginning(field.content_args.get("tag_pattern", "")) if field.content == "xml-inline" else None
        return pattern if value is None else Closing(pattern, value=value)

    def after_anchor(self, prompt: str) -> str:
        """The beginning of the assistant's message that the prompt already has; "" where no message begins."""
        ends = [match.end() for match in self._anchor.finditer(prompt)]
        return prompt[ends[-1] :] if ends else ""

    def value(self, name: str, region: Region) -> Any:
        """What transformers makes of a region's text. ValueError or another exception if it is invalid."""
        from transformers.utils.chat_parsing.content_parsers import process_field

        field = self.fields[name]
        if len(region.body) > MAX_REGION:
            raise ValueError("the region is too long")
        for pattern in _inner_patterns(field.content_args):  # transformers matches without a time limit
            for _ in BoundedPattern(regex.compile(pattern, regex.DOTALL)).finditer(region.body):
                pass
        captures = self.captures(name, region)
        if field.content == "json" and field.content_args:
            with suppress(ValueError):  # plain JSON, which the rules of a dialect may change
                return process_field(region.body, replace(field, content_args={}), captures)
        return process_field(region.body, field, captures)

    def captures(self, name: str, region: Region) -> dict[str, str]:
        """The named groups of a region's opening marker."""
        pattern = self.fields[name].open_re
        match = None if pattern is None else BoundedPattern(pattern).search(region.opened + region.body)
        return {} if match is None else {group: text for group, text in match.groupdict().items() if text is not None}

    def closing(self, name: str) -> str:
        """The marker that ends a region, where there is only one; else ""."""
        literals = self.fields[name].close_literals or []
        return literals[0] if len(literals) == 1 else ""


def _inner_patterns(arguments: dict[str, Any]) -> Iterator[str]:
    """The patterns that a content parser of transformers searches in a region."""
    if "tag_pattern" in arguments:
        yield arguments["tag_pattern"]
    for opening, closing in arguments.get("string_delims", ()):
        yield f"{regex.escape(opening)}(.*?){regex.escape(closing)}"
    if isinstance(inner := arguments.get("value_parser"), dict):
        yield from _inner_patterns(inner.get("args", {}))


def _as_text(template: dict[str, Any]) -> dict[str, Any]:
    """A copy of a template in which all fields are text."""
    fields = {}
    for name, field in template["fields"].items():
        anchors = {key: field[key] for key in ("open", "open_pattern", "close", "close_pattern") if key in field}
        # Named groups of the anchors need a transform.
        text = {
            "content": "text",
            "content_args": {"strip": False},
            "repeats": True,
            "transform": {"body": "{content}"},
        }
        fields[name] = {**anchors, **text}
    return {**template, "fields": fields}


@cache
def _parser_class() -> Any:
    """Transformers' parser with more in its events: a region's opening marker (``opened``) and where that begins
    (``start``), where its closing marker ends (``end``), and whether it has one (``closed``); in characters."""
    from transformers.utils.chat_parsing import ResponseParser

    class Parser(ResponseParser):  # type: ignore[misc]  # it has no types
        @property
        def pending(self) -> int:
            """Characters that are in no event yet, because they may be a marker."""
            buffered: str = self._buffer
            position: int = self._pos
            return len(buffered) - position

        def _open_explicit(self, events: list[dict[str, Any]], field: Any, match: Any) -> None:
            super()._open_explicit(events, field, match)
            events[-1] |= {"opened": match.group(), "start": match.start()}
            self._body_start = match.end()

        def _close_current(self, events: list[dict[str, Any]]) -> None:
            before, explicit = len(events), self._current != self._implicit_name
            closed = explicit and self._pos > self._body_start + len(self._body)
            super()._close_current(events)
            for event in events[before:]:
                event |= {"end": self._pos, "closed": closed}

    return Parser


def _loader() -> Any:
    try:
        from transformers.utils.chat_parsing.response_templates import load_response_template
    except ImportError:
        raise ConfigError(
            "Tool and reasoning formats need transformers >= 5.17 (response_template); update it, or set "
            "--tool-call-parser none --reasoning-parser none."
        ) from None
    return load_response_template
