"""Finds where the region of a tool call ends: at its closing marker, but not at one inside of a JSON string.

A response template can't express this: its patterns know nothing of the text before a marker.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import regex

from .patterns import BoundedPattern

JSON_STRING = regex.compile(r'(?:[^"\\\x00-\x1f]|\\[^\x00-\x1f])*+')  # what is between quotes
VALUE_GROUP = "(?P<value>"  # in the pattern of an XML-like element


class Closing:
    """A closing marker; it takes the place of its pattern in one parser of transformers, whose regions it follows.

    A control character, which JSON has in no string, ends the search for strings: the text isn't JSON. Until the next
    value or region, the first marker counts.
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
        quotes = "|".join(map(regex.escape, ('"', *self._closers)))
        self._in_json = BoundedPattern(regex.compile(quotes if value is None else f"{quotes}|<"))
        self._outside = value
        self._end = -1  # of the match that was returned last
        self._at = 0  # what is before this position has been searched
        self._quote = ""  # the beginning of the string that it is in
        self._marks: BoundedPattern | None = value or self._in_json

    def search(self, text: str, position: int = 0, partial: bool = False) -> regex.Match[str] | None:
        """The first marker from ``position`` on, or with ``partial`` the beginning of one at the end of the text."""
        if position > self._end:  # the match was used: another region begins here
            self._at, self._quote, self._marks = position, "", self._outside or self._in_json
        self._end = sys.maxsize
        while not self._quote or self._leave_string(text):
            mark = None if self._marks is None else self._marks.search(text, self._at, partial=partial)
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
        return None

    def _enter(self, mark: regex.Match[str]) -> None:
        if self._marks is self._outside:
            self._marks, self._at = self._in_json, mark.end()
        elif mark.group() == "<":  # JSON has none outside of strings, so the value has ended
            self._marks, self._at = self._outside, mark.start()
        else:
            self._quote, self._at = mark.group(), mark.end()

    def _leave_string(self, text: str) -> bool:
        """Go on to the end of the string, as far as the text has it; whether it has."""
        if closer := self._closers.get(self._quote):
            end = text.find(closer, self._at)
            if end < 0:
                self._at = max(self._at, len(text) - len(closer) + 1)
                return False
            self._at = end + len(closer)
        else:
            match = JSON_STRING.match(text, self._at)
            assert match is not None  # it may be empty
            self._at = match.end()
            rest = text[self._at : self._at + 2]
            if rest in ("", "\\"):
                return False
            if rest[0] == '"':
                self._at += 1
            else:
                self._marks = self._outside
        self._quote = ""
        return True


def value_beginning(tag_pattern: str) -> BoundedPattern | None:
    """What precedes an array or object as the value of an XML-like element; None if the pattern doesn't tell."""
    before, found, _ = tag_pattern.partition(VALUE_GROUP)
    try:
        return BoundedPattern(regex.compile(before + r"(?=[\[{])", regex.DOTALL)) if found else None
    except regex.error:  # the value is inside of another group
        return None
