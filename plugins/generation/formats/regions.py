"""Loads response templates for transformers' parser, with limits on the time of their patterns.

The parser splits the output into regions. Here every region is loaded as plain text, so that the parser itself raises
no error for invalid contents; :meth:`Regions.value` has transformers parse a region's text afterwards, within limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import regex
from msgspec import Struct

from trunkline.core.errors import ConfigError, RequestError

PATTERN_SECONDS = 0.25  # limit on one search; linear patterns take microseconds
MAX_REGION = 1 << 20  # characters of a region that is parsed; a longer one is left as text
OPENED = "trunkline_opened"  # name of the group that captures the text of an opening marker


class TooSlow(RequestError):
    """A pattern exceeded its time limit on the model's output."""

    def __init__(self) -> None:
        super().__init__(
            f"A pattern of the model's response_template took more than {PATTERN_SECONDS:g} s on its output; "
            "--tool-call-parser and --reasoning-parser choose other formats."
        )


class BoundedPattern:
    """The part of a compiled pattern that transformers' parser uses, with a time limit. Raises TooSlow."""

    def __init__(self, pattern: regex.Pattern[str]) -> None:
        self._pattern = pattern
        self.groupindex = pattern.groupindex

    def search(self, text: str, position: int = 0, partial: bool = False) -> regex.Match[str] | None:
        """The first match from ``position`` on."""
        try:
            return self._pattern.search(text, position, partial=partial, timeout=PATTERN_SECONDS)
        except TimeoutError:
            raise TooSlow from None

    def finditer(self, text: str) -> Iterator[regex.Match[str]]:
        """All matches."""
        try:
            yield from self._pattern.finditer(text, timeout=PATTERN_SECONDS)
        except TimeoutError:
            raise TooSlow from None


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
        """A new parser of transformers, at the beginning of a message."""
        from transformers.utils.chat_parsing import ResponseParser

        return ResponseParser(self.spec, prefix="")

    def after_anchor(self, prompt: str) -> str:
        """The beginning of the assistant's message that the prompt already has; "" where no message begins."""
        ends = [match.end() for match in self._anchor.finditer(prompt)]
        return prompt[ends[-1] :] if ends else ""

    def region(self, name: str, value: Any) -> Region:
        """The value of a closed region, as the parser with :attr:`spec` makes it."""
        literals = self.fields[name].open_literals or [""]
        return Region(value.get("opened", literals[0]), value["body"])

    def value(self, name: str, region: Region) -> Any:
        """What transformers makes of a region's text. ValueError or another exception if it is invalid."""
        from transformers.utils.chat_parsing.content_parsers import process_field

        field = self.fields[name]
        if len(region.body) > MAX_REGION:
            raise ValueError("the region is too long")
        for pattern in _inner_patterns(field.content_args):  # transformers matches without a time limit
            for _ in BoundedPattern(regex.compile(pattern, regex.DOTALL)).finditer(region.body):
                pass
        captures = {}
        if field.open_re is not None and (match := BoundedPattern(field.open_re).search(region.opened + region.body)):
            captures = {group: text for group, text in match.groupdict().items() if text is not None}
        if field.content == "json" and field.content_args:
            with suppress(ValueError):  # plain JSON, which the rules of a dialect may change
                return process_field(region.body, replace(field, content_args={}), captures)
        return process_field(region.body, field, captures)

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
    """A copy of a template in which all fields are text, and have their opening marker where it isn't fixed."""
    fields = {}
    for name, field in template["fields"].items():
        anchors = {key: field[key] for key in ("open", "open_pattern", "close", "close_pattern") if key in field}
        transform = {"body": "{content}"}
        pattern = anchors.get("open_pattern")
        if isinstance(anchors.get("open"), list):
            pattern = "|".join(map(regex.escape, sorted(anchors.pop("open"), key=len, reverse=True)))
        if pattern is not None:
            anchors["open_pattern"] = f"(?P<{OPENED}>{pattern})"
            transform["opened"] = f"{{{OPENED}}}"
        text = {"content": "text", "content_args": {"strip": False}, "repeats": True, "transform": transform}
        fields[name] = {**anchors, **text}
    return {**template, "fields": fields}


def _loader() -> Any:
    try:
        from transformers.utils.chat_parsing.response_templates import load_response_template
    except ImportError:
        raise ConfigError(
            "Tool and reasoning formats need transformers >= 5.17 (response_template); update it, or set "
            "--tool-call-parser none --reasoning-parser none."
        ) from None
    return load_response_template
