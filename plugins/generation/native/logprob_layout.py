"""What a sequence has beside text, as SGLang lays it out in ``meta_info``.

Frames of a stream are cumulative, so the lists are kept as JSON text: each entry is encoded once, and a frame costs a
copy. NaN and infinities become null, as everywhere.
"""

from __future__ import annotations

import base64
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import Any, cast

import msgspec
import numpy as np

from trunkline.core.server.api import encode_json
from trunkline.core.types import Tokenizer
from trunkline.plugins.generation.extras import Extras
from trunkline.plugins.generation.schemas import GenerationResult, LogprobParams, LogprobTable

Entry = tuple[float | None, int, str | None]

NUMBERS = 1 << 16  # that are encoded at a time; other threads have to wait as long


class JsonList:
    """A JSON array that only grows."""

    def __init__(self) -> None:
        self.text = bytearray()  # without brackets

    def extend(self, items: Iterable[Any]) -> None:
        encoded = encode_json(list(items))[1:-1]
        if encoded:
            self.text += b"," + encoded if self.text else encoded

    def as_json(self) -> msgspec.Raw:
        return msgspec.Raw(b"".join((b"[", self.text, b"]")))


class LogprobLists:
    """``output_token_logprobs`` and the other lists: an entry is ``[logprob, id, text]``."""

    def __init__(self, kind: str, params: LogprobParams, tokenizer: Tokenizer | None) -> None:
        """``kind`` is "input" or "output"; ``tokenizer`` None: the third item of entries is null."""
        self._params = params
        self._tokenizer = tokenizer
        self._chosen, self._top, self._ids = JsonList(), JsonList(), JsonList()
        self._lists = {f"{kind}_token_logprobs": self._chosen}
        if params.top:
            self._lists[f"{kind}_top_logprobs"] = self._top
        if params.ids:
            self._lists[f"{kind}_token_ids_logprobs"] = self._ids

    def begin(self, token: int) -> None:
        """The entry of a token that nothing predicts: no values."""
        self._chosen.extend(self._entries([None], [token]))
        self._top.extend([None])
        self._ids.extend([None])

    def add(self, table: LogprobTable, tokens: Sequence[int]) -> None:
        """The entries of the next ``tokens``."""
        chosen, values, wanted = (np.frombuffer(data, "<f4") for data in (table.chosen, table.top, table.ids))
        ids, asked = np.frombuffer(table.top_ids, "<i4"), self._params.ids
        top = len(ids) // max(1, len(tokens))  # fewer than were asked for where the vocabulary is smaller
        step = max(1, NUMBERS // (1 + top + len(asked)))
        for first in range(0, len(tokens), step):
            some = slice(first, first + step)
            count = len(tokens[some])
            self._chosen.extend(self._entries(chosen[some].tolist(), tokens[some]))
            if top:
                part = slice(first * top, (first + count) * top)
                self._top.extend(_rows(self._entries(values[part].tolist(), ids[part].tolist()), top))
            if asked:
                part = slice(first * len(asked), (first + count) * len(asked))
                self._ids.extend(_rows(self._entries(wanted[part].tolist(), asked * count), len(asked)))

    def meta(self) -> dict[str, msgspec.Raw]:
        return {name: entries.as_json() for name, entries in self._lists.items()}

    def _entries(self, values: Sequence[float | None], ids: Sequence[int]) -> list[Entry]:
        if self._tokenizer is None:
            return [(value, token, None) for value, token in zip(values, ids, strict=True)]
        key = cast("Hashable", self._tokenizer)
        return [(value, token, token_text(key, token)) for value, token in zip(values, ids, strict=True)]


def _rows(entries: list[Entry], width: int) -> list[list[Entry]]:
    """Lists of ``width`` entries."""
    return [entries[at : at + width] for at in range(0, len(entries), width)]


@lru_cache(maxsize=1 << 16)
def token_text(tokenizer: Any, token: int) -> str:
    """The text of one token by itself; half a character is U+FFFD."""
    return str(tokenizer.decode([token], skip_special_tokens=False))


class HiddenStates:
    """``hidden_states``: a matrix for the prompt's positions, then a vector for each pass; or the last vector."""

    def __init__(self, hidden_size: int, prompt_len: int) -> None:
        self._size = hidden_size
        self._prompt_len = prompt_len
        self._prompt, self._output = JsonList(), JsonList()
        self._last: list[float] = []

    def add(self, rows: bytes, position: int) -> None:
        """float32 rows of the positions from ``position`` on."""
        values = np.frombuffer(rows, "<f4").reshape(-1, self._size)
        step = max(1, NUMBERS // self._size)
        of_prompt = max(0, self._prompt_len - position)
        for target, part in ((self._prompt, values[:of_prompt]), (self._output, values[of_prompt:])):
            for first in range(0, len(part), step):
                target.extend(part[first : first + step].tolist())
        self._last = values[-1].tolist()

    def every(self) -> msgspec.Raw:
        separator = b"," if self._output.text else b""
        return msgspec.Raw(b"".join((b"[[", self._prompt.text, b"]", separator, self._output.text, b"]")))

    def last(self) -> list[float]:
        return self._last


class ExtraLists:
    """All that one sequence has beside text, from the results of its reply."""

    def __init__(self, extras: Extras, prompt: Sequence[int], hidden_size: int, tokenizer: Tokenizer | None) -> None:
        self._prompt = prompt
        self._extras = extras
        self._lists: dict[str, LogprobLists] = {}
        if (logprobs := extras.logprobs) is not None:
            readable = tokenizer if extras.text else None
            self._lists = {kind: LogprobLists(kind, logprobs, readable) for kind in ("input", "output")}
            if logprobs.start is not None and logprobs.start < len(prompt):
                self._lists["input"].begin(prompt[logprobs.start])
        self._hidden = HiddenStates(hidden_size, len(prompt))
        self._choices = bytearray()
        self._experts = ""

    def take_prompt(self, result: GenerationResult) -> None:
        """The result's part that is about the prompt's tokens."""
        if result.prompt is not None and self._lists:
            count = len(result.prompt.chosen) // 4
            self._lists["input"].add(result.prompt, self._prompt[result.first : result.first + count])

    def take(self, result: GenerationResult) -> None:
        """The next result."""
        self.take_prompt(result)
        if result.output is not None and self._lists:
            ids = np.frombuffer(result.output.chosen_ids, "<i4").tolist()
            self._lists["output"].add(result.output, ids)
        if result.hidden:
            self._hidden.add(result.hidden, result.hidden_at)
        self._choices += result.experts

    def close(self) -> None:
        """Nothing more will come."""
        self._experts = base64.b64encode(self._choices).decode()

    def meta(self) -> dict[str, Any]:
        """What ``meta_info`` has of it so far."""
        meta: dict[str, Any] = {}
        for lists in self._lists.values():
            meta |= lists.meta()
        if self._extras.hidden_states == "all":
            meta["hidden_states"] = self._hidden.every()
        elif last := self._hidden.last():
            meta["hidden_states"] = last
        if self._experts:
            meta["routed_experts"] = self._experts
        return meta
