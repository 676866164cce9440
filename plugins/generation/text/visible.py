"""The text of a sequence as its client sees it: without the stop string that ended it, or the beginning of one.

Stop strings are searched in the text with special tokens, so that ``"<|im_start|>"`` can be one. The client's text
leaves special tokens out unless the request wants them, so positions in the first text have to be translated into
positions in the second.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import cast

from trunkline.core.types import Tokenizer

from .detokenizer import IncrementalDetokenizer, special_ids
from .stops import partial_stop_length


class VisibleText:
    """Text of a growing token sequence; ``stops`` are the strings that the client must not see.

    ``kept``: ids of special tokens that are in the text although others are skipped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        skip_special_tokens: bool,
        stops: Sequence[str],
        kept: frozenset[int] = frozenset(),
    ) -> None:
        self._stops = stops
        decoder_skips = skip_special_tokens and not kept
        self._visible = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=decoder_skips)
        self._searched = self._visible
        self._special: frozenset[int] = frozenset()
        if skip_special_tokens and (stops or kept):
            self._special = special_ids(cast("Hashable", tokenizer)) - kept
        if skip_special_tokens and stops:
            self._searched = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=False)
        self._left_out = self._special if kept else frozenset()  # else the decoder leaves them out
        # Lengths of the searched and the visible text after each run of tokens. Inside a run, either both texts grow
        # by the same characters, or the visible one doesn't grow.
        self._run_ends: list[tuple[int, int]] = []
        self._last_is_special = True  # the last run can't be continued

    def push(self, tokens: Sequence[int]) -> None:
        """Decode the next tokens."""
        if self._searched is self._visible:
            self._visible.push([token for token in tokens if token not in self._left_out] if self._left_out else tokens)
            return
        for run, special in self._runs(tokens):
            self._searched.push(run)
            if not (special and self._left_out):
                self._visible.push(run)
            if not special and not self._last_is_special:
                self._run_ends.pop()
            self._run_ends.append((len(self._searched.text), len(self._visible.text)))
            self._last_is_special = special

    def so_far(self) -> str:
        """The text that no later token can take back."""
        text = self._searched.text
        return self._before(len(text) - partial_stop_length(text, self._stops))

    def finish(self, stop: str | None = None) -> str:
        """The final text, up to ``stop`` if it is the stop string that ended the sequence."""
        searched = self._searched.finish()
        if self._searched is not self._visible:
            self._visible.finish()
        position = -1 if stop is None else searched.find(stop)
        return self._before(len(searched) if position < 0 else position)

    def _runs(self, tokens: Sequence[int]) -> Iterator[tuple[Sequence[int], bool]]:
        """Neighbouring ordinary tokens as one run, each special token as a run of its own; whether it is special."""
        for special, group in groupby(tokens, self._special.__contains__):
            run = list(group)
            yield from (([token], True) for token in run) if special else [(run, False)]

    def _before(self, position: int) -> str:
        """The visible text that precedes character ``position`` of the searched text."""
        text = self._visible.text
        if self._searched is self._visible:
            return text[:position]
        index = bisect_right(self._run_ends, position, key=itemgetter(0))
        if index == len(self._run_ends):
            return text
        searched_end, visible_end = self._run_ends[index]
        visible_start = self._run_ends[index - 1][1] if index else 0
        # Counted from the run's end, because decoders may drop a space at its beginning.
        return text[: max(visible_start, visible_end - (searched_end - position))]
