"""Regular expressions that end a text (``stop_regex``): RE2's syntax, and a bounded cost for each token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

MAX_INSTRUCTIONS = 8192  # of all patterns of a request together, as RE2 compiles them; \pL takes 1200
MAX_LISTS = 64  # different lists of patterns in a batch: each takes up to 3 ms and 512 KiB
WINDOW = 8192  # characters in which a match must begin
# Instructions times characters of one search. Where RE2 can't build its automaton it simulates all instructions at
# each character, some 3 ns each: 3 ms a token at worst. Patterns of more than 128 instructions get a shorter window.
BUDGET = 1 << 20
MEMORY, LEAST_MEMORY = 1 << 19, 1 << 16  # bytes for all patterns of a request, and for each at least


class StopRegexes:
    """Compiled patterns. ``window``: how many characters at the end of a text a match may begin in to be found."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """ValueError, which says why, for what RE2 doesn't take or takes too many instructions for."""
        import re2  # here, because most servers never need it

        options = re2.Options()
        options.max_mem = max(LEAST_MEMORY, MEMORY // max(1, len(patterns)))
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
        self.window = min(WINDOW, BUDGET // max(1, instructions))

    def search(self, text: str) -> str | None:
        """The first of the patterns with a match in ``text``, of which nothing matched a token ago."""
        start = max(0, len(text) - self.window)
        # One character more, so that ^ and \b know that the window isn't the text's beginning.
        tail, position = (text[start - 1 :], 1) if start else (text, 0)
        for pattern, compiled in self._patterns:
            if compiled.search(tail, position) is not None:
                return pattern
        return None


compile_regexes = lru_cache(maxsize=MAX_LISTS)(StopRegexes)
"""StopRegexes of a tuple of patterns, which requests with the same patterns share."""


def _reason(error: Exception) -> str:
    """RE2's sentence, which it gives as bytes."""
    reason = error.args[0] if error.args else ""
    return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
