"""What happens to logits before they are sampled: penalties, forbidden ends, biases, third parties' processors.

In SGLang's order: frequency and presence penalty, repetition penalty, ``min_new_tokens``, ``logit_bias``, processors;
then temperature and the filters. Penalties count generated tokens only, never the prompt's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from trunkline.core.errors import RequestError
from trunkline.core.types import PartRow, Request
from trunkline.plugins.generation.schemas import GenerationParams

from .extensions import Extensions, Processor

Ids = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
Table = tuple[Ids, Floats]  # ids without repetition, and a value for each


class Adjust(Protocol):
    """``kernels.adjust``: changes the listed logits of float32 ``[R, V]`` in place."""

    def __call__(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        penalties: torch.Tensor,
        starts: torch.Tensor,
        ids: torch.Tensor,
        counts: torch.Tensor,
        bias_starts: torch.Tensor,
        bias_ids: torch.Tensor,
        biases: torch.Tensor,
        /,
    ) -> None: ...


class TokenCounts:
    """How often each token was generated, as arrays that grow with it."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._places: dict[int, int] = {}
        self._ids: Ids = np.zeros(16, np.int64)
        self._counts: Floats = np.zeros(16, np.float32)
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """One more token."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[place] = token
        self._counts[place] += 1

    def table(self) -> Table:
        """Ids and counts; views that the next :meth:`add` may change."""
        size = len(self._places)
        return self._ids[:size], self._counts[:size]


class Adjustment:
    """What one request asks for. ``lockstep``: its next token depends on the last one beyond the forward pass."""

    __slots__ = ("_early", "_failure", "_late", "_minimum", "_processors", "counts", "lockstep", "penalties")

    def __init__(
        self,
        params: GenerationParams,
        ends: Collection[int],
        output: Sequence[int],
        processors: Sequence[tuple[Processor, Any]],
    ) -> None:
        """``ends``: ids that are forbidden before ``min_new_tokens``. ``output``: what is generated already."""
        self.penalties = (params.frequency_penalty, params.presence_penalty, params.repetition_penalty)
        self.counts = TokenCounts(output) if self.penalties != NO_PENALTIES else None
        self._minimum = params.min_new_tokens
        biases = dict(params.logit_bias)
        self._late = _table(biases)
        self._early = _table(biases | dict.fromkeys(ends, -np.inf)) if self._minimum else self._late
        self._processors = processors
        self._failure: RequestError | None = None
        self.lockstep = bool(self.counts is not None or self._minimum or processors)

    def biases(self, produced: int) -> Table:
        """What is added to logits for the token after ``produced`` ones."""
        return self._early if produced < self._minimum else self._late

    def process(self, logits: torch.Tensor, request: Request) -> None:
        """Let processors change the request's row ``[V]``; a failure is kept for :meth:`account`."""
        self._failure = None
        try:
            for processor, state in self._processors:
                processor(state, logits, request.output)
        except RequestError as error:
            self._failure = error

    def account(self, token: int) -> RequestError | None:
        """Count the token that was drawn, -1 if none could be. What ends the request, if processors failed."""
        if self._failure is not None:
            return self._failure
        if token < 0:
            what = "left no finite logit, or a NaN or infinite one"
            failures = [processor.failed("apply", what) for processor, _ in self._processors]
            return failures[-1] if failures else None
        for processor, _ in self._processors:
            processor.succeeded("apply")
        if self.counts is not None:
            self.counts.add(token)
        return None


NO_PENALTIES = (0.0, 0.0, 1.0)


def find_adjustment(
    request: Request, eos: Collection[int], vocabulary: int, extensions: Extensions
) -> Adjustment | None:
    """A request's adjustment, None if it asks for nothing. RequestError for ids outside the vocabulary."""
    params: GenerationParams = request.params
    for token, _ in params.logit_bias:
        if not 0 <= token < vocabulary:
            message = f"logit_bias must has keys in [0, {vocabulary - 1}], got {token}."
            raise RequestError(message, param="logit_bias")
    processors = extensions.processors(request)
    penalties = (params.frequency_penalty, params.presence_penalty, params.repetition_penalty)
    if penalties == NO_PENALTIES and not (params.min_new_tokens or params.logit_bias or processors):
        return None
    ends = {token for token in (*eos, *params.stop_token_ids) if 0 <= token < vocabulary}
    if len(ends) == vocabulary:
        ends = set()  # nothing would be left to generate
    return Adjustment(params, ends, request.output, processors)


class Adjuster:
    """Adjusts the rows of a pass that ask for it; others keep every bit."""

    def __init__(self, adjust: Adjust) -> None:
        self._adjust = adjust

    def __call__(self, rows: Sequence[PartRow], logits: torch.Tensor) -> None:
        """Overwrite ``logits``, float32 ``[len(rows), V]``: those of each row's next token."""
        asking = [
            (index, row, adjustment)
            for index, row in enumerate(rows)
            if (adjustment := row.request.state.adjustment) is not None
        ]
        if asking:
            self._run(asking, logits)

    def _run(self, asking: Sequence[tuple[int, PartRow, Adjustment]], logits: torch.Tensor) -> None:
        counted = [NOTHING if one.counts is None else one.counts.table() for _, _, one in asking]
        biased = [one.biases(row.end - row.request.prompt_len) for _, row, one in asking]
        if any(len(ids) for ids, _ in (*counted, *biased)):
            rows = np.array([index for index, _, _ in asking], np.int64)
            penalties = np.array([one.penalties for _, _, one in asking], np.float64)
            arrays = (rows, penalties, *_joined(counted), *_joined(biased))
            self._adjust(logits, *(torch.from_numpy(array).to(logits.device) for array in arrays))
        for index, row, one in asking:
            one.process(logits[index], row.request)


def _table(values: dict[int, float]) -> Table:
    return np.array(list(values), np.int64), np.array(list(values.values()), np.float32)


NOTHING = _table({})


def _joined(tables: Sequence[Table]) -> tuple[Ids, Ids, Floats]:
    """Where each table begins and the last one ends, all ids, all values."""
    starts = np.cumsum([0, *(len(ids) for ids, _ in tables)], dtype=np.int64)
    return starts, np.concatenate([ids for ids, _ in tables]), np.concatenate([values for _, values in tables])
