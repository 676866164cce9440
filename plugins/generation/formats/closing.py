"""Finds where the region of a tool call ends: at its closing marker, but not at one in a JSON string.

A response template can't express this: its patterns know nothing of the text before a marker.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import regex

from trunkline.plugins.generation.text.stops import partial_stop_length

from .patterns import BoundedPattern

JSON_STRING = regex.compile(r'(?:[^"\\\x00-\x1f]|\\[^\x00-\x1f])*+')  # what is between quotes
AFTER_STRING = regex.compile(r"[ \t\r\n]{0,64}+[,:}\]]")
VALUE_GROUP = "(?P<value>"  # in the pattern of an XML-like element
ANY = regex.compile(".")


class Closing:
    """A closing marker; it takes the place of its pattern in one parser of transformers, whose regions it follows.

    A control character, which JSON has in no string, ends the search for strings: the text isn't JSON. Until the next
    value or region, the first marker counts.

    A marker in a string waits for the string's end. It is part of the string if JSON goes on after it. Else the model
    has escaped a quote by mistake or left one out, and the marker ends the region: if something else comes, a control
    character, or the end of the text.
    """

    def __init__(
        self,
        pattern: BoundedPattern,
        *,
        delimiters: Iterable[tuple[str, str]] = (),
        value: BoundedPattern | None = None,
    ) -> None:
        """``delimiters``: what else begins and ends a string. ``value``: what precedes a JSON value in a region that is
        no JSON itself; None: the whole region is JSON."""
        self._pattern = pattern
        self._closers = dict(delimiters)
        quotes = "|".join(map(regex.escape, (*self._closers, '"')))
        self._in_json = BoundedPattern(regex.compile(quotes if value is None else f"{quotes}|<"))
        self._outside = value
        self._end = -1  # of the match that was returned last
        self._string_end = 0  # JSON strings that begin before this position, and haven't ended, go on to it
        self._begin(0)

    def _begin(self, position: int) -> None:
        """A region begins."""
        self._at = position  # what is before this position has been searched
        self._quote = ""  # the beginning of the string that it is in
        self._marks: BoundedPattern | None = self._outside or self._in_json
        self._marker: regex.Match[str] | None = None  # the first one in the string, or the beginning of one
        self._marker_from = position  # where it is searched

    def search(self, text: str, position: int = 0, partial: bool = False) -> regex.Match[str] | None:
        """The first marker from ``position`` on, or with ``partial`` what may become one as the text grows."""
        if position > self._end:  # the match was used: another region begins here
            self._begin(position)
        self._end = sys.maxsize
        while True:
            if self._quote:
                whole = self._leave_string(text, partial=partial)
                if self._marker is not None and (whole is False or not (whole or partial)):
                    self._end = self._marker.end()
                    return self._marker
                if whole is None:
                    return None if self._marker is None else _pending(text, self._marker.start())
                self._marker = None
            mark = self._next_mark(text, partial=partial)
            complete = mark is not None and not mark.partial
            end = mark.start() if mark is not None and complete else len(text)
            found = self._pattern.search(text, self._at, partial=partial and not complete, end=end)
            if found is not None and (mark is None or found.start() < mark.start()):
                if found.partial:
                    self._at = found.start()
                else:
                    self._end = found.end()
                return found
            if mark is None or mark.partial:
                self._at = len(text) if mark is None else mark.start()
                return mark
            self._enter(mark)

    def _next_mark(self, text: str, *, partial: bool) -> regex.Match[str] | None:
        """Where the next string or value begins."""
        mark = None if self._marks is None else self._marks.search(text, self._at, partial=partial)
        if partial and mark is not None and not mark.partial:
            # A delimiter may have a quote, and a whole match comes before the beginning of another one.
            start = len(text) - partial_stop_length(text, [*self._closers])
            if self._at <= start <= mark.start():
                return _pending(text, start)
        return mark

    def _enter(self, mark: regex.Match[str]) -> None:
        if self._marks is self._outside:
            self._marks, self._at = self._in_json, mark.end()
        elif mark.group() == "<":  # JSON has none outside of strings, so the value has ended
            self._marks, self._at = self._outside, mark.start()
        else:
            self._quote, self._at = mark.group(), mark.end()
            self._marker_from = self._at

    def _leave_string(self, text: str, *, partial: bool) -> bool | None:
        """Go on to the end of the string, as far as the text has it, and find the first marker in it.

        Whether it is a string; None if the text hasn't told yet.
        """
        closer = self._closers.get(self._quote, '"')
        if self._quote in self._closers:
            end = text.find(closer, self._at)
            self._at = end if end >= 0 else max(self._at, len(text) - len(closer) + 1)
            ended = whole = end >= 0
        else:
            match = JSON_STRING.match(text, max(self._at, self._string_end))
            assert match is not None  # it may be empty
            self._at = self._string_end = match.end()
            ended = text[self._at : self._at + 2] not in ("", "\\")
            whole = text.startswith(closer, self._at)
        self._find_marker(text, self._at if ended else len(text), partial=partial and not ended)
        if not ended:
            return None
        if whole and self._marker is not None:
            after = AFTER_STRING.match(text, self._at + len(closer), partial=True)
            if after is None or after.partial:
                return None if after else False
        if whole:
            self._at += len(closer)
        else:
            self._marks = self._outside
        self._quote = ""
        return whole

    def _find_marker(self, text: str, end: int, *, partial: bool) -> None:
        """Find the first marker in the string, or with ``partial`` the beginning of one, before position ``end``."""
        if self._marker is not None and not self._marker.partial:
            return
        found = self._pattern.search(text, self._marker_from, partial=partial, end=end)
        self._marker_from = end if found is None else found.start()
        self._marker = found if self._marker_from < end else None


def _pending(text: str, start: int) -> regex.Match[str] | None:
    """A partial match: the text from ``start`` on may become a marker."""
    return ANY.match(text, start, start, partial=True)


def value_beginning(tag_pattern: str) -> BoundedPattern | None:
    """What precedes an array or object as the value of an XML-like element; None if the pattern doesn't tell."""
    before, found, _ = tag_pattern.partition(VALUE_GROUP)
    try:
        return BoundedPattern(regex.compile(before + r"(?=[\[{])", regex.DOTALL)) if found else None
    except regex.error:  # the value is inside of another group
        return None
