"""From token ids to text, a few tokens at a time.

The text of a sequence must not depend on how its tokens were grouped into steps, must not show
half of a multi-byte character, and must keep the space that opens a word after the prompt.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, cast

from trunkline.core.types import Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what a decoder shows for bytes that aren't a character (yet)
PROMPT_TAIL = 5  # prompt ids that precede the output in the first window
WINDOW = 16  # ids in the window before it is moved
KEEP = 4  # ids that stay in it as context
PATIENCE = 16  # ids that may wait for a character to become complete; it takes four bytes at most


class TextStream:
    """Text of a growing token sequence.

    Decoders treat the first token of a call specially (metaspace ones strip its space), so
    tokens are decoded in a window that starts with some earlier ids: ``window[:]`` decodes to
    some text of which the first ``done`` characters are already in ``text`` or are the prompt's.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._skipped = special_ids(cast("Hashable", tokenizer)) if skip_special_tokens else frozenset()
        self._window = list(prompt[-PROMPT_TAIL:])
        self._done = len(self._decode(self._window))
        self._waiting = 0  # ids since the last complete character
        self.text = ""  # complete characters only

    def push(self, tokens: Sequence[int]) -> None:
        """Take the next tokens; ``text`` grows by what is certain."""
        if len(tokens) > 1 and self._whole(tokens):
            return
        for token in tokens:
            self._window.append(token)
            decoded = self._decode(self._window)
            certain = decoded.rstrip(UNKNOWN)
            self._waiting = 0 if len(certain) == len(decoded) else self._waiting + 1
            if self._waiting > PATIENCE:  # not text; don't let the window grow with it
                certain, self._waiting = decoded, 0
            if len(certain) > self._done:
                self.text += certain[self._done :]
                self._done = len(certain)
            if len(self._window) > WINDOW and len(certain) == len(decoded):
                self._move(decoded)

    def finish(self) -> str:
        """The final text: nothing more will come, so bytes held back become U+FFFD."""
        self.text += self._decode(self._window)[self._done :]
        return self.text

    def _whole(self, tokens: Sequence[int]) -> bool:
        """Decode all tokens at once; only where the result is what one at a time would give."""
        decoded = self._decode([*self._window, *tokens])
        if UNKNOWN in decoded or len(decoded) < self._done:
            return False
        self._window.extend(tokens)
        self.text += decoded[self._done :]
        self._done = len(decoded)
        if len(self._window) > WINDOW:
            self._move(decoded)
        return True

    def _move(self, decoded: str) -> None:
        """Drop the window's head, and tokens that aren't shown, when the rest decodes to the end of the same text."""
        rest = [token for token in self._window if token not in self._skipped][-KEEP:]
        kept = self._decode(rest)
        if decoded.endswith(kept) and bool(kept) == bool(decoded):
            self._window = rest
            self._done = len(kept)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip) if ids else ""


@lru_cache(maxsize=64)  # more models than one server has
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that decoding leaves out when it skips special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset((*tokenizer.all_special_ids, *(id_ for id_, token in added.items() if token.special)))
