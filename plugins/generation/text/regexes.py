"""Regular expressions that end a sequence (``stop_regex``): RE2's syntax, at a bounded cost per token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

MAX_INSTRUCTIONS = 8192  # of all patterns of a request together, after compilation by RE2; \pL takes 1200
MAX_LISTS = 64  # different lists of patterns in a batch: each takes up to 3 ms and 512 KiB
WINDOW = 8192  # characters in which a match must begin
# Limit on instructions times characters of one search. Where RE2 can't build its automaton, it simulates all
# instructions at each character, at about 3 ns each: 1 ms per token at worst. The window of patterns that have more
# than 32 instructions is therefore shorter.
MAX_SEARCH_COST = 1 << 18
MEMORY, MIN_MEMORY = 1 << 19, 1 << 16  # bytes for all patterns of a request together, and at least for each


class StopRegexes:
    """Compiled patterns. A match must begin in the last ``window`` characters of a text to be found."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """ValueError, with the reason, for patterns that RE2 rejects or that need too many instructions."""
        import re2  # not at the top: most servers never need it

        options = re2.Options()
        options.max_mem = max(MIN_MEMORY, MEMORY // max(1, len(patterns)))
        options.log_errors = False
        self._patterns = []
        instructions = 0
        for pattern in patterns:
            try:
                compiled = re2.compile(pattern, options)
            except re2.error as error:
                raise ValueError(f"{pattern!r:.60} can't be used: {_reason(error)}") from None
            except UnicodeEncodeError:
                raise ValueError(f"{pattern!r:.60} can't be used: it is not valid Unicode") from None
            instructions += compiled.programsize
            if instructions > MAX_INSTRUCTIONS:
                raise ValueError(
                    f"{pattern!r:.60} can't be used: with it the patterns need {instructions} instructions, and at "
                    f"most {MAX_INSTRUCTIONS} are allowed; counted repetitions such as x{{1,500}} need many"
                )
            self._patterns.append((pattern, compiled))
        self.window = min(WINDOW, MAX_SEARCH_COST // max(1, instructions))

    def search(self, text: str) -> str | None:
        """The first pattern that matches in ``text``, or None. Call it after each token, until it finds one."""
        start = max(0, len(text) - self.window)
        # One more character, so that ^ and \b don't take the window's beginning for the text's.
        tail, offset = (text[start - 1 :], 1) if start else (text, 0)
        for pattern, compiled in self._patterns:
            if compiled.search(tail, offset) is not None:
                return pattern
        return None


compile_regexes = lru_cache(maxsize=MAX_LISTS)(StopRegexes)
"""StopRegexes of a tuple of patterns, which requests with the same patterns share."""


def _reason(error: Exception) -> str:
    """RE2's message, which is a bytes object."""
    reason = error.args[0] if error.args else ""
    return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
