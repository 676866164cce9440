"""The entries of ``meta_info`` for extra outputs, in SGLang's layout.

Frames of a stream are cumulative. Therefore lists are kept as JSON text: each item is encoded once, and copied for
each frame. NaN and infinities become null, as in all replies.
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

Entry = tuple[float | None, int, str | None]  # log-probability, token id, its text

MAX_ENCODED = 1 << 16  # numbers that are encoded in one call, during which no other thread runs


class JsonList:
    """A JSON array to which items are appended."""

    def __init__(self) -> None:
        self.text = bytearray()  # without brackets

    def extend(self, items: Iterable[Any]) -> None:
        encoded = encode_json(list(items))[1:-1]
        if encoded:
            self.text += b"," + encoded if self.text else encoded

    def as_json(self) -> msgspec.Raw:
        return msgspec.Raw(b"".join((b"[", self.text, b"]")))


class LogprobLists:
    """The lists of log-probabilities of the prompt or the output: ``output_token_logprobs`` and the like."""

    def __init__(self, kind: str, params: LogprobParams, tokenizer: Tokenizer | None) -> None:
        """``kind`` is "input" or "output"; ``tokenizer`` None: the third item of entries is null."""
        self._params = params
        self._tokenizer = tokenizer
        self._tokens, self._top, self._ids = JsonList(), JsonList(), JsonList()
        self._lists = {f"{kind}_token_logprobs": self._tokens}
        if params.top:
            self._lists[f"{kind}_top_logprobs"] = self._top
        if params.ids:
            self._lists[f"{kind}_token_ids_logprobs"] = self._ids

    def add_unpredicted(self, token: int) -> None:
        """Add the first token, which has no log-probability."""
        self._tokens.extend(self._entries([None], [token]))
        self._top.extend([None])
        self._ids.extend([None])

    def add(self, table: LogprobTable, tokens: Sequence[int]) -> None:
        """Add the next ``tokens``, whose log-probabilities are in ``table``."""
        own, top, of_ids = (np.frombuffer(data, "<f4") for data in (table.chosen, table.top, table.ids))
        top_ids, ids = np.frombuffer(table.top_ids, "<i4"), self._params.ids
        width = len(top_ids) // max(1, len(tokens))  # less than params.top if the vocabulary is smaller
        step = max(1, MAX_ENCODED // (1 + width + len(ids)))
        for first in range(0, len(tokens), step):
            part = slice(first, first + step)
            count = len(tokens[part])
            self._tokens.extend(self._entries(own[part].tolist(), tokens[part]))
            if width:
                cells = slice(first * width, (first + count) * width)
                self._top.extend(_rows(self._entries(top[cells].tolist(), top_ids[cells].tolist()), width))
            if ids:
                cells = slice(first * len(ids), (first + count) * len(ids))
                self._ids.extend(_rows(self._entries(of_ids[cells].tolist(), ids * count), len(ids)))

    def meta(self) -> dict[str, msgspec.Raw]:
        """The lists by their names in ``meta_info``."""
        return {name: entries.as_json() for name, entries in self._lists.items()}

    def _entries(self, values: Sequence[float | None], ids: Sequence[int]) -> list[Entry]:
        if self._tokenizer is None:
            return [(value, token, None) for value, token in zip(values, ids, strict=True)]
        key = cast("Hashable", self._tokenizer)
        return [(value, token, token_text(key, token)) for value, token in zip(values, ids, strict=True)]


def _rows(entries: list[Entry], width: int) -> list[list[Entry]]:
    """The entries in lists of ``width``."""
    return [entries[start : start + width] for start in range(0, len(entries), width)]


@lru_cache(maxsize=1 << 16)
def token_text(tokenizer: Any, token: int) -> str:
    """The text of a single token; an incomplete character is U+FFFD."""
    return str(tokenizer.decode([token], skip_special_tokens=False))


class HiddenStates:
    """``hidden_states``: a matrix for the prompt, then a vector for each output token; or only the last vector."""

    def __init__(self, hidden_size: int, prompt_len: int) -> None:
        self._size = hidden_size
        self._prompt_len = prompt_len
        self._prompt, self._output = JsonList(), JsonList()
        self._last: list[float] = []

    def add(self, rows: bytes, position: int) -> None:
        """Add ``rows``, float32 ``[positions, hidden_size]``, of the positions from ``position`` on."""
        values = np.frombuffer(rows, "<f4").reshape(-1, self._size)
        step = max(1, MAX_ENCODED // self._size)
        of_prompt = max(0, self._prompt_len - position)
        for target, part in ((self._prompt, values[:of_prompt]), (self._output, values[of_prompt:])):
            for first in range(0, len(part), step):
                target.extend(part[first : first + step].tolist())
        self._last = values[-1].tolist()

    def all(self) -> msgspec.Raw:
        """All hidden states so far."""
        separator = b"," if self._output.text else b""
        return msgspec.Raw(b"".join((b"[[", self._prompt.text, b"]", separator, self._output.text, b"]")))

    def last(self) -> list[float]:
        """The last hidden state, [] if there is none."""
        return self._last


class ExtraMetaInfo:
    """The extra outputs of one sequence, from the results of its reply (a ``ResultReader``)."""

    cost = 1

    def __init__(self, extras: Extras, prompt: Sequence[int], hidden_size: int, tokenizer: Tokenizer | None) -> None:
        self._prompt = prompt
        self._extras = extras
        self._hidden_size = hidden_size
        self._tokenizer = tokenizer if extras.text else None
        self._experts = bytearray()
        self._routed_experts = ""  # base64
        self._start()

    def _start(self) -> None:
        """Begin without outputs of the prompt, which come before all others."""
        self._lists: dict[str, LogprobLists] = {}
        if (logprobs := self._extras.logprobs) is not None:
            self._lists = {kind: LogprobLists(kind, logprobs, self._tokenizer) for kind in ("input", "output")}
            if logprobs.start is not None and logprobs.start < len(self._prompt):
                self._lists["input"].add_unpredicted(self._prompt[logprobs.start])
        self._hidden = HiddenStates(self._hidden_size, len(self._prompt))

    def add_prompt(self, result: GenerationResult) -> None:
        """Add the log-probabilities of the prompt in a result, and nothing else of it."""
        if result.restart:
            self._start()
        if result.prompt is not None and self._lists:
            count = len(result.prompt.chosen) // 4
            self._lists["input"].add(result.prompt, self._prompt[result.first : result.first + count])

    def add(self, result: GenerationResult) -> None:
        """Add the reply's next result."""
        self.add_prompt(result)
        if result.output is not None and self._lists:
            ids = np.frombuffer(result.output.chosen_ids, "<i4").tolist()
            self._lists["output"].add(result.output, ids)
        if result.hidden:
            self._hidden.add(result.hidden, result.hidden_at)
        self._experts += result.experts

    def finish(self) -> None:
        """All results have been added: routed experts, which are sent at the end only, are complete."""
        self._routed_experts = base64.b64encode(self._experts).decode()

    def meta(self) -> dict[str, Any]:
        """The entries of ``meta_info`` so far."""
        meta: dict[str, Any] = {}
        for lists in self._lists.values():
            meta |= lists.meta()
        if self._extras.hidden_states == "all":
            meta["hidden_states"] = self._hidden.all()
        elif last := self._hidden.last():
            meta["hidden_states"] = last
        if self._routed_experts:
            meta["routed_experts"] = self._routed_experts
        return meta
