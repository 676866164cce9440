"""Incremental detokenization: from token ids to text, a few tokens at a time.

The text of a sequence doesn't depend on how its tokens are grouped into steps. An incomplete multi-byte character is
held back, and the space that begins a word after the prompt is kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, cast

from trunkline.core.types import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder returns for bytes that aren't a (complete) character
PROMPT_TAIL = 5  # prompt ids that precede the output in the first window
WINDOW = 16  # ids in the window above which it is shortened
CONTEXT = 4  # ids that remain in a shortened window
MAX_INCOMPLETE = 16  # ids that may wait for a character to become complete; it has four bytes at most


class IncrementalDetokenizer:
    """Decodes a growing token sequence; ``text`` has all complete characters.

    Decoders treat the first token of a call specially (metaspace ones strip its space), so tokens are decoded in a
    window that begins with some earlier ids. Of the decoded window, the first ``_decoded_length`` characters are in
    ``text`` already or belong to the prompt; the rest is new.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._skipped_ids = special_ids(cast("Hashable", tokenizer)) if skip_special_tokens else frozenset()
        self._window = list(prompt[-PROMPT_TAIL:])
        self._decoded_length = len(self._decode(self._window))
        self._incomplete = 0  # ids since the last complete character
        self.text = ""

    def push(self, tokens: Sequence[int]) -> None:
        """Decode the next tokens and append all complete characters to ``text``."""
        if len(tokens) > 1 and self._push_at_once(tokens):
            return
        for token in tokens:
            self._window.append(token)
            decoded = self._decode(self._window)
            complete = decoded.rstrip(REPLACEMENT)
            self._incomplete = 0 if len(complete) == len(decoded) else self._incomplete + 1
            if self._incomplete > MAX_INCOMPLETE:  # these bytes aren't text, and must not make the window grow
                complete, self._incomplete = decoded, 0
            if len(complete) > self._decoded_length:
                self.text += complete[self._decoded_length :]
                self._decoded_length = len(complete)
            if len(self._window) > WINDOW and len(complete) == len(decoded):
                self._shorten_window(decoded)

    def finish(self) -> str:
        """The final text: bytes of an incomplete character at its end become U+FFFD."""
        self.text += self._decode(self._window)[self._decoded_length :]
        return self.text

    def _push_at_once(self, tokens: Sequence[int]) -> bool:
        """Decode all tokens in one call. False, without a change, if decoding one by one may give another result."""
        decoded = self._decode([*self._window, *tokens])
        if REPLACEMENT in decoded or len(decoded) < self._decoded_length:
            return False
        self._window.extend(tokens)
        self.text += decoded[self._decoded_length :]
        self._decoded_length = len(decoded)
        if len(self._window) > WINDOW:
            self._shorten_window(decoded)
        return True

    def _shorten_window(self, decoded: str) -> None:
        """Leave the last visible ids in the window, if they decode to the end of ``decoded``, the window's text."""
        rest = [token for token in self._window if token not in self._skipped_ids][-CONTEXT:]
        decoded_rest = self._decode(rest)
        if decoded.endswith(decoded_rest) and bool(decoded_rest) == bool(decoded):
            self._window = rest
            self._decoded_length = len(decoded_rest)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip) if ids else ""


@lru_cache(maxsize=64)  # more models than one server has
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that decoding leaves out when it skips special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset((*tokenizer.all_special_ids, *(id_ for id_, token in added.items() if token.special)))
