"""Splits a reply into reasoning, content and tool calls, whole or as it is generated.

The result doesn't depend on how the text is cut: a whole reply is parsed by the same class in one piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import regex
from msgspec import Struct

from .calls import ToolCall, read_calls, with_types
from .choose import REASONING, REST, ReplyFormat
from .patterns import TooSlow
from .regions import Region, Regions
from .streamed_calls import StreamedCall

Kind = Literal["content", "reasoning", "call", "arguments", "other"]

BARE = regex.compile(r'[ \n]{0,64}+\[?[ \n]{0,64}+\{[ \n]{0,64}+"(?:name|function|type|parameters)"')
"""The beginning of a tool call without a marker."""


class Piece(Struct, frozen=True):
    """A part of a reply: more text of its content or reasoning, or a tool call.

    "arguments" is more text of the arguments of the last call.
    """

    kind: Kind
    text: str = ""
    call: ToolCall | None = None


class ReplyParser:
    """Parses one reply. ``prefix``: what the prompt has of it. ``schemas``: the tools' parameters by name.

    White space next to reasoning and tool calls is left out. A region that is no valid call is content, unless its name
    and the beginning of its arguments came in a form that is streamed.
    """

    def __init__(
        self, form: ReplyFormat, regions: Regions, prefix: str, schemas: Mapping[str, Any] | None = None
    ) -> None:
        self._regions = regions
        self._schemas = schemas or {}
        self._parser = regions.parser()
        self._kind: Kind = "content"
        self._before = ""  # what was held when the open region began
        self._held = ""  # white space that is left out if a region begins after it
        self._fresh = form.own  # no text of the current kind yet, so that white space is left out
        self._split = False  # something other than content came
        self._sent: set[Kind] = set()
        self._bare: str | None = "" if schemas and form.tool is not None and form.tool.bare and not form.own else None
        begins_open = "" if form.thoughts is None or form.own else form.thoughts.begins_open
        if begins_open and not any(marker in prefix for marker in (begins_open, "</")):
            prefix += begins_open
        self._pieces: list[Piece] = []
        self._reasoning: list[list[int]] = []  # where its parts begin and end, in characters
        self._prefix_length = len(prefix)
        self._size = 0  # characters of the open region
        self._opened = ""  # its opening marker
        self._streamed: StreamedCall | None = None  # the call in it
        self._read(self._parser.feed(prefix))
        self._pieces = self._begun_call()  # nothing else of the prompt is part of the reply
        self._held = ""

    @property
    def in_reasoning(self) -> bool:
        """Whether the text so far ends inside the reasoning."""
        return self._kind == "reasoning"

    @property
    def separates_reasoning(self) -> bool:
        """Whether the reasoning of a reply isn't part of its content."""
        return any(_kind(name) == "reasoning" for name in self._regions.fields)

    def reasoning(self) -> list[tuple[int, int]]:
        """Where the complete parts of the reasoning, with their markers, begin and end in the reply's text."""
        spans = (span for span in self._reasoning if len(span) == 2 and span[1] > self._prefix_length)
        return [(max(0, start - self._prefix_length), end - self._prefix_length) for start, end in spans]

    def cost(self, text: str) -> int:
        """Characters that :meth:`feed` may have to parse."""
        pending: int = self._parser.pending
        return self._size + pending + len(text)

    def feed(self, text: str) -> list[Piece]:
        """The pieces that are complete with the next part of the text."""
        if self._bare is not None:
            self._bare += text
            if BARE.match(self._bare, partial=True):
                return []
            text, self._bare = self._bare, None
        if text:
            self._read(self._parser.feed(text))
        return self._taken()

    def finish(self) -> list[Piece]:
        """The rest of the pieces, at the end of the text."""
        if self._bare is not None:
            bare, self._bare = self._bare, None
            try:
                calls = read_calls(bare, self._schemas)
            except (ValueError, RecursionError):
                calls = []
            if calls and all(call.name in self._schemas for call in calls):
                return [Piece("call", call=call) for call in calls]
            self._read(self._parser.feed(bare))
        _, events = self._parser.finalize()
        self._read(events)
        if self._kind == "content" and not self._split:
            self._emit("content", self._held)
        return self._taken()

    def _begun_call(self) -> list[Piece]:
        """The pieces of the call in which the prompt ends."""
        return self._pieces[-2:] if self._streamed is not None and self._streamed.name else []

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _read(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            name = event["field"]
            kind = _kind(name)
            if kind != self._kind:
                self._begin(kind)
            if event["type"] == "region_open":
                self._opened = event.get("opened", "")
                self._streamed = StreamedCall(self._regions, name, self._opened) if kind == "call" else None
                if kind == "reasoning" and self._opened:
                    self._reasoning.append([event["start"]])
            elif event["type"] == "region_chunk":
                self._size += len(event["text"])
                if kind in ("content", "reasoning"):
                    self._text(kind, event["text"])
                elif self._streamed is not None:
                    self._stream(self._streamed, event["text"])
            elif event["type"] == "region_close":
                self._size = 0
                if kind == "reasoning" and self._opened:
                    self._reasoning[-1].append(event["end"])
                if self._streamed is not None and not self._streamed.name:
                    self._call(name, Region(self._opened, event["value"]["body"]), closed=event["closed"])
                self._streamed = None

    def _stream(self, call: StreamedCall, text: str) -> None:
        begun = bool(call.name)
        arguments = call.feed(text)
        if call.name:
            self._size = 0  # the region isn't parsed at its end
        if call.name and not begun:
            self._pieces.append(Piece("call", call=ToolCall(call.name, "")))
        if arguments:
            self._pieces.append(Piece("arguments", arguments))

    def _begin(self, kind: Kind) -> None:
        self._kind, self._before, self._held = kind, self._held, ""
        self._split = self._split or kind != "content"
        self._fresh = True

    def _text(self, kind: Kind, text: str) -> None:
        text = self._held + text
        if self._fresh and kind not in self._sent:
            text = text.lstrip()
        if not text:
            return
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self._fresh = self._fresh and not shown
        self._emit(kind, shown)

    def _emit(self, kind: Kind, text: str) -> None:
        if text:
            self._sent.add(kind)
            self._pieces.append(Piece(kind, text))

    def _call(self, name: str, region: Region, *, closed: bool) -> None:
        try:
            value = self._regions.value(name, region)
            calls = read_calls(self._typed(name, value), self._schemas)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, TooSlow):
            self._emit(
                "content", self._before + region.opened + region.body + (self._regions.closing(name) if closed else "")
            )
            return
        self._pieces.extend(Piece("call", call=call) for call in calls)

    def _typed(self, name: str, value: Any) -> Any:
        """The call of a region with its arguments' types, if the region's own syntax has none."""
        function = value.get("function") if isinstance(value, dict) else None
        if self._regions.fields[name].content not in ("xml-inline", "kv-lines") or not isinstance(function, dict):
            return value
        schema = self._schemas.get(str(function.get("name", "")).strip())
        arguments = function.get("arguments")
        if not isinstance(arguments, dict):
            return value
        return {**value, "function": {**function, "arguments": with_types(arguments, schema)}}


def _kind(name: str) -> Kind:
    if name.startswith("tool_calls"):
        return "call"
    if name.startswith(REASONING):
        return "reasoning"
    return "content" if name in ("content", REST) else "other"
