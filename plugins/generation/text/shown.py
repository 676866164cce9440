"""The text of a sequence as its client sees it: without the stop string, and without half of one.

Stop strings are searched in the text with special tokens, so that ``"<|im_start|>"`` can be one. The
text that is shown leaves special tokens out unless the request wants them, so a position in the first
text must be translated into one in the second.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import cast

from trunkline.core.types import Tokenizer

from .stops import held_back
from .stream import TextStream, special_ids


class ShownText:
    """Text of a growing token sequence; ``stops`` are the strings that must not be shown."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool, stops: Sequence[str]
    ) -> None:
        self._stops = stops
        self._shown = TextStream(tokenizer, prompt, skip_special_tokens=skip_special_tokens)
        self._searched = self._shown
        self._special: frozenset[int] = frozenset()
        if stops and skip_special_tokens:
            self._searched = TextStream(tokenizer, prompt, skip_special_tokens=False)
            self._special = special_ids(cast("Hashable", tokenizer))
        # Lengths of the searched and the shown text after each run. Inside a run both texts grow by the
        # same characters, or the shown one by none.
        self._ends: list[tuple[int, int]] = []
        self._special_last = True  # the last run can't be continued

    def push(self, tokens: Sequence[int]) -> None:
        """Take the next tokens."""
        if self._searched is self._shown:
            self._shown.push(tokens)
            return
        for run, special in self._runs(tokens):
            self._searched.push(run)
            self._shown.push(run)
            if not special and not self._special_last:
                self._ends.pop()
            self._ends.append((len(self._searched.text), len(self._shown.text)))
            self._special_last = special

    def so_far(self) -> str:
        """What can be shown whatever comes next."""
        text = self._searched.text
        return self._before(len(text) - held_back(text, self._stops))

    def finish(self, stop: str | None = None) -> str:
        """The final text, up to ``stop`` if it is a stop string that ended the sequence."""
        searched = self._searched.finish()
        if self._searched is not self._shown:
            self._shown.finish()
        at = -1 if stop is None else searched.find(stop)
        return self._before(len(searched) if at < 0 else at)

    def _runs(self, tokens: Sequence[int]) -> Iterator[tuple[Sequence[int], bool]]:
        """Ordinary tokens together, each special one by itself."""
        for special, group in groupby(tokens, self._special.__contains__):
            run = list(group)
            yield from (([token], True) for token in run) if special else [(run, False)]

    def _before(self, at: int) -> str:
        """The shown text that precedes character ``at`` of the searched one."""
        text = self._shown.text
        if self._searched is self._shown:
            return text[:at]
        index = bisect_right(self._ends, at, key=itemgetter(0))
        if index == len(self._ends):
            return text
        searched, shown = self._ends[index]
        before = self._ends[index - 1][1] if index else 0
        # From the run's end, because decoders may drop a space at its beginning.
        return text[: max(before, shown - (searched - at))]
