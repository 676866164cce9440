"""Reads a tool call while it is written: first its name, then its arguments as they come.

Only for formats in which the arguments are a JSON object after the name. What the client has can't be taken back, so a
text is a call as soon as it has a name and the beginning of the object, whole or in a stream.
"""

from __future__ import annotations

from typing import Any

import regex

from .regions import Region, Regions
from .templates import CALL, FUNCTION

SPACE = r"[ \t\r\n]{0,64}+"
AFTER_MARKER = regex.compile(rf"{SPACE}(?=\{{)")
AFTER_NAME = regex.compile(
    rf'{SPACE}\{{{SPACE}"name"{SPACE}:{SPACE}"(?P<name>[\w.\-]{{1,128}}+)"{SPACE},'
    rf'{SPACE}"(?:arguments|parameters)"{SPACE}:{SPACE}(?=\{{)'
)
STRUCTURE = regex.compile(r'["\\{}\[\]]')


class StreamedCall:
    """Reads the region of one call. ``name`` is "" until the arguments begin, which may be never."""

    def __init__(self, regions: Regions, field: str, opened: str) -> None:
        """``field``: of the response template; ``opened``: the region's opening marker."""
        self.name = ""
        self._head = _head(regions.fields[field])
        self._regions, self._field, self._opened = regions, field, opened
        self._unread = ""  # the text so far, until the arguments begin
        self._depth = 0  # of objects and lists in the arguments
        self._in_string = False
        self._escaped = False  # the text so far ends with a backslash in a string
        self._complete = False

    def feed(self, text: str) -> str:
        """The next part of the arguments, in the next part of the region's text."""
        if self._head is not None:
            self._unread += text
            match = self._head.match(self._unread, partial=True)
            if match is not None and match.partial:
                return ""
            self._head = None
            if match is None:
                return ""
            captures = match.groupdict() or self._regions.captures(self._field, Region(self._opened, "{"))
            self.name = captures.get("name", "").strip()
            text = self._unread[match.end() :]
        return self._arguments(text) if self.name and not self._complete else ""

    def _arguments(self, text: str) -> str:
        """The part of a text before the end of the arguments."""
        skipped = int(self._escaped)  # characters after a backslash
        for match in STRUCTURE.finditer(text):
            position, character = match.start(), match.group()
            if position < skipped:
                continue
            if character == '"':
                self._in_string = not self._in_string
            elif character == "\\":
                skipped = position + 2 if self._in_string else 0
            elif not self._in_string:
                self._depth += 1 if character in "{[" else -1
                if self._depth == 0:
                    self._complete = True
                    return text[: position + 1]
        self._escaped = skipped > len(text)
        return text


def _head(field: Any) -> regex.Pattern[str] | None:
    """The pattern of what is before the arguments in a region; None for formats without such a beginning."""
    if field.content != "json" or field.content_args:
        return None
    return AFTER_MARKER if field.transform == CALL else AFTER_NAME if field.transform == FUNCTION else None
