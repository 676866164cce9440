"""Log-probabilities in OpenAI's two layouts, made from the results of a reply.

Each entry is encoded once, when its result arrives; what a stream has sent is dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, cast

import numpy as np

from trunkline.core.errors import RequestError
from trunkline.core.types import ServedModel, Tokenizer
from trunkline.plugins.generation.native.meta_info import MAX_ENCODED, JsonList
from trunkline.plugins.generation.sampling.params import SamplingParams
from trunkline.plugins.generation.schemas import GenerationResult, LogprobParams, LogprobTable
from trunkline.plugins.generation.settings import new_token_limit
from trunkline.plugins.generation.text.detokenizer import IncrementalDetokenizer

from .token_strings import chat_token, legacy_token, token_name

MAX_TOP = 50  # as for /generate
MAX_LOGPROBS = 1 << 21  # of all sequences of a request
LOWEST = -9999.0  # OpenAI's value for tokens that can't be sampled; JSON has no infinity

LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")

Ranked = list[tuple[int, float]]
"""Ids with their log-probabilities, the most likely first."""


class LogprobReader(ABC):
    """Collects the log-probabilities of one sequence (a ``ResultReader``)."""

    cost: int

    def __init__(
        self, prompt: Sequence[int], start: int | None, tokenizer: Tokenizer, *, names: bool, output: bool = True
    ) -> None:
        """``start``: first position of the prompt that has entries. ``names``: tokens are shown as ``token_id:7``.

        ``output``: whether output tokens have entries. With a limit of 0 tokens, the engine still scores the next one.
        """
        self._prompt = prompt
        self._start = start
        self._tokenizer = tokenizer
        self._key = cast("Hashable", tokenizer)
        self._names = names
        self._output = output
        self.clear()
        self._add_unpredicted()

    def add_prompt(self, result: GenerationResult) -> None:
        """Add the log-probabilities of the prompt in a result, and nothing else of it."""
        if result.restart:
            self.clear()
            self._add_unpredicted()
        if result.prompt is not None:
            count = len(result.prompt.chosen) // 4
            self._add(result.prompt, self._prompt[result.first : result.first + count], output=False)

    def add(self, result: GenerationResult) -> None:
        """Add the reply's next result."""
        self.add_prompt(result)
        if result.output is not None and self._output:
            self._add(result.output, np.frombuffer(result.output.chosen_ids, "<i4").tolist(), output=True)

    def finish(self) -> None:
        """All results have been added."""

    def meta(self) -> dict[str, Any]:
        """Nothing: these log-probabilities aren't in ``meta_info``."""
        return {}

    def _add_unpredicted(self) -> None:
        """Add the prompt's first token, which has no log-probability."""
        if self._start == 0:
            self.append([(self._prompt[0], None, [])], output=False)

    def _add(self, table: LogprobTable, tokens: Sequence[int], *, output: bool) -> None:
        own, top = (np.frombuffer(data, "<f4") for data in (table.chosen, table.top))
        ids = np.frombuffer(table.top_ids, "<i4")
        width = len(ids) // max(1, len(tokens))  # less than requested if the vocabulary is smaller
        step = max(1, MAX_ENCODED // (1 + width) // self.cost)
        for first in range(0, len(tokens), step):
            part = tokens[first : first + step]
            cells = slice(first * width, (first + len(part)) * width)
            ranked = list(zip(ids[cells].tolist(), map(_in_range, top[cells].tolist()), strict=True))
            values = map(_in_range, own[first : first + step].tolist())
            self.append(
                [
                    (token, value, ranked[row * width : (row + 1) * width])
                    for row, (token, value) in enumerate(zip(part, values, strict=True))
                ],
                output=output,
            )

    @abstractmethod
    def clear(self) -> None:
        """Drop all entries."""

    @abstractmethod
    def append(self, rows: Sequence[tuple[int, float | None, Ranked]], *, output: bool) -> None:
        """Add tokens of the output or the prompt, with their log-probabilities and those of the most likely ids."""

    @abstractmethod
    def take(self) -> dict[str, Any] | None:
        """``logprobs`` of a choice, with the entries since the last call; None if there are none."""


class ChatLogprobs(LogprobReader):
    """``logprobs.content`` of ``/v1/chat/completions``: an entry for each output token."""

    cost = 16

    def clear(self) -> None:
        self._content = JsonList()

    def append(self, rows: Sequence[tuple[int, float | None, Ranked]], *, output: bool) -> None:
        assert output
        self._content.extend(
            {**self._entry(token, value), "top_logprobs": [self._entry(*each) for each in ranked]}
            for token, value, ranked in rows
        )

    def take(self) -> dict[str, Any] | None:
        if not self._content.text:
            return None
        content, self._content = self._content, JsonList()
        return {"content": content.as_json(), "refusal": None}

    def _entry(self, token: int, value: float | None) -> dict[str, Any]:
        text, data = chat_token(self._key, token)
        return {"token": token_name(token) if self._names else text, "logprob": value, "bytes": data}


class CompletionLogprobs(LogprobReader):
    """``logprobs`` of ``/v1/completions``: four lists with an item for each token, of the prompt too with echo.

    ``text_offset`` is where a token begins in the choice's text, in characters: for a part of a character the position
    of that character. Tokens that the text leaves out, such as a stop string's, have the offset at which they would be.
    """

    cost = 32

    def __init__(
        self,
        prompt: Sequence[int],
        start: int | None,
        tokenizer: Tokenizer,
        *,
        names: bool,
        output: bool,
        skip_special_tokens: bool,
        prompt_length: int,
    ) -> None:
        """``prompt_length``: characters of the prompt with which the choice's text begins; 0 without echo."""
        self._skip = skip_special_tokens
        self._prompt_length = prompt_length
        super().__init__(prompt, start, tokenizer, names=names, output=output)

    def clear(self) -> None:
        self._lists = {name: JsonList() for name in LISTS}
        # They only count characters: of the prompt's text, and of the output's.
        self._prompt_text = IncrementalDetokenizer(self._tokenizer, (), skip_special_tokens=self._skip)
        self._text = IncrementalDetokenizer(self._tokenizer, self._prompt, skip_special_tokens=self._skip)

    def append(self, rows: Sequence[tuple[int, float | None, Ranked]], *, output: bool) -> None:
        items: dict[str, list[Any]] = {name: [] for name in LISTS}
        for token, value, ranked in rows:
            items["tokens"].append(self._shown(token))
            items["token_logprobs"].append(value)
            items["top_logprobs"].append(None if value is None else self._top(token, value, ranked))
            items["text_offset"].append(self._offset(token, output=output))
        for name in LISTS:
            self._lists[name].extend(items[name])

    def take(self) -> dict[str, Any] | None:
        if not self._lists["tokens"].text:
            return None
        lists, self._lists = self._lists, {name: JsonList() for name in LISTS}
        return {name: entries.as_json() for name, entries in lists.items()}

    def _shown(self, token: int) -> str:
        return token_name(token) if self._names else legacy_token(self._key, token)

    def _offset(self, token: int, *, output: bool) -> int:
        """Where a token begins in the text, and count its characters."""
        counter = self._text if output else self._prompt_text
        offset = len(counter.text)
        counter.push((token,))
        return self._prompt_length + offset if output else min(offset, self._prompt_length)

    def _top(self, token: int, value: float, ranked: Ranked) -> dict[str, float]:
        """The most likely tokens, and the token itself, by their texts; of equal texts, the likeliest one's value."""
        top: dict[str, float] = {}
        for each, its_value in (*ranked, (token, value)):
            # Clients compare the token's own value with the largest: both must be the same number.
            top.setdefault(self._shown(each), value if each == token else its_value)
        return top


def _in_range(value: float) -> float:
    return value if value > LOWEST else LOWEST  # also for NaN


def read_logprobs(top: int, start: int | None, field: str) -> LogprobParams:
    """Checked parameters; ``field`` has ``top``."""
    if not 0 <= top <= MAX_TOP:
        raise RequestError(f"{field} must be in [0, {MAX_TOP}], got {top}.", param=field)
    return LogprobParams(start, top)


def check_count(
    params: LogprobParams, prompts: Sequence[list[int]], sampling: SamplingParams, served: ServedModel, field: str
) -> None:
    """RequestError if the reply could have more log-probabilities than ``MAX_LOGPROBS``."""
    limit, rows = served.max_request_tokens, 0
    requested = limit if sampling.max_new_tokens is None else sampling.max_new_tokens
    for prompt in prompts:
        rows += new_token_limit(len(prompt), requested, limit) + (0 if params.start is None else len(prompt))
    if (count := rows * sampling.n * (1 + params.top)) > MAX_LOGPROBS:
        raise RequestError(
            f"The request asks for up to {count} log-probabilities; at most {MAX_LOGPROBS} are returned at once. "
            f"Set max_tokens, lower n or {field}, or split the request.",
            param=field,
        )
