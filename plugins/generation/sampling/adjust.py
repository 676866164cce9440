"""Adjusts logits before sampling: penalties, ``min_new_tokens``, ``logit_bias``, plugins' logits processors.

The order is SGLang's: frequency and presence penalty, repetition penalty, ``min_new_tokens``, ``logit_bias``,
processors; then the sampler applies temperature and the filters. Penalties count generated tokens only, never the
prompt's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from trunkline.core.errors import RequestError
from trunkline.core.types import PartRow, Request
from trunkline.plugins.generation.schemas import GenerationParams

from .checks import check_bias
from .extensions import Extensions, Processor

Ids = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
IdTable = tuple[Ids, Floats]  # distinct token ids, and a value for each


class Adjust(Protocol):
    """The operation of ``kernels.adjust``: changes logits, float32 ``[R, V]``, of the given rows and ids in place."""

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
    """Counts of the generated tokens, in arrays that grow when needed."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._indices: dict[int, int] = {}
        self._ids: Ids = np.zeros(16, np.int64)
        self._counts: Floats = np.zeros(16, np.float32)
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Count one more token."""
        index = self._indices.setdefault(token, len(self._indices))
        if index == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[index] = token
        self._counts[index] += 1

    def table(self) -> IdTable:
        """Ids and counts, as views that the next :meth:`add` may change."""
        size = len(self._indices)
        return self._ids[:size], self._counts[:size]


class Adjustment:
    """The adjustments of one request.

    ``lockstep``: the logits of a token are adjusted with the tokens before it (see ``Needs.lockstep``).
    """

    __slots__ = ("_biases", "_early_biases", "_failure", "_minimum", "_processors", "counts", "lockstep", "penalties")

    def __init__(
        self,
        params: GenerationParams,
        end_ids: Collection[int],
        output: Sequence[int],
        processors: Sequence[tuple[Processor, Any]],
    ) -> None:
        """``end_ids`` are forbidden before ``min_new_tokens``. ``output``: tokens that were generated before."""
        self.penalties = (params.frequency_penalty, params.presence_penalty, params.repetition_penalty)
        self.counts = TokenCounts(output) if self.penalties != NO_PENALTIES else None
        self._minimum = params.min_new_tokens
        biases = dict(params.logit_bias)
        self._biases = _table(biases)
        self._early_biases = _table(biases | dict.fromkeys(end_ids, -np.inf)) if self._minimum else self._biases
        self._processors = processors
        self._failure: RequestError | None = None
        self.lockstep = bool(self.counts is not None or self._minimum or processors)

    def biases(self, output_len: int) -> IdTable:
        """Biases of the logits for the token after ``output_len`` output tokens."""
        return self._early_biases if output_len < self._minimum else self._biases

    def process(self, logits: torch.Tensor, request: Request) -> None:
        """Call the processors on the request's row, float32 ``[V]``; :meth:`accept_token` returns their failure."""
        self._failure = None
        try:
            for processor, state in self._processors:
                processor(state, logits, request.output)
        except RequestError as error:
            self._failure = error

    def accept_token(self, token: int) -> RequestError | None:
        """Count the sampled token (-1: the row wasn't finite). Returns the error that ends the request, if any."""
        if self._failure is not None:
            return self._failure
        if token < 0:
            problem = "left no finite logit, or a NaN or infinite one"
            errors = [processor.record_failure("apply", problem) for processor, _ in self._processors]
            return errors[-1] if errors else None
        for processor, _ in self._processors:
            processor.record_success("apply")
        if self.counts is not None:
            self.counts.add(token)
        return None


NO_PENALTIES = (0.0, 0.0, 1.0)


def make_adjustment(
    request: Request, eos: Collection[int], vocab_size: int, extensions: Extensions
) -> Adjustment | None:
    """A request's adjustments, None if there are none. RequestError for a biased id outside the vocabulary."""
    params: GenerationParams = request.params
    check_bias("logit_bias", params.logit_bias, vocab_size)
    processors = extensions.processors(request)
    penalties = (params.frequency_penalty, params.presence_penalty, params.repetition_penalty)
    if penalties == NO_PENALTIES and not (params.min_new_tokens or params.logit_bias or processors):
        return None
    end_ids = {token for token in (*eos, *params.stop_token_ids) if 0 <= token < vocab_size}
    if len(end_ids) == vocab_size:
        end_ids = set()  # no token could be generated otherwise
    return Adjustment(params, end_ids, request.output, processors)


class AdjustedRow(NamedTuple):
    """A row whose logits are adjusted; ``place``: its index among the sampled rows."""

    place: int
    row: PartRow
    adjustment: Adjustment


def adjusted_rows(rows: Sequence[PartRow]) -> list[AdjustedRow]:
    """Those of the sampled ``rows`` whose requests have an adjustment."""
    return [
        AdjustedRow(place, row, adjustment)
        for place, row in enumerate(rows)
        if (adjustment := row.request.state.adjustment) is not None
    ]


def kernel_arrays(adjusted: Sequence[AdjustedRow]) -> dict[str, np.ndarray]:
    """The arguments of :class:`Adjust` after the logits, in its order; {} if no logit changes."""
    counts = [EMPTY if each.adjustment.counts is None else each.adjustment.counts.table() for each in adjusted]
    biases = [each.adjustment.biases(each.row.end - each.row.request.prompt_len) for each in adjusted]
    if not any(len(ids) for ids, _ in (*counts, *biases)):
        return {}
    indices = np.array([each.place for each in adjusted], np.int64)
    penalties = np.array([each.adjustment.penalties for each in adjusted], np.float64)
    arrays = (indices, penalties, *_concatenate(counts), *_concatenate(biases))
    return dict(zip(KERNEL_ARGUMENTS, arrays, strict=True))


def adjust_rows(
    adjust: Adjust, adjusted: Sequence[AdjustedRow], inputs: Mapping[str, torch.Tensor], logits: torch.Tensor
) -> None:
    """Adjust the logits of the sampled rows, float32 ``[R, V]``. ``inputs``: :func:`kernel_arrays` on the device."""
    if KERNEL_ARGUMENTS[0] in inputs:
        adjust(logits, *(inputs[name] for name in KERNEL_ARGUMENTS))
    for place, row, adjustment in adjusted:
        adjustment.process(logits[place], row.request)


KERNEL_ARGUMENTS = tuple(
    f"adjust.{name}" for name in ("rows", "penalties", "starts", "ids", "counts", "bias_starts", "bias_ids", "biases")
)


def _table(values: dict[int, float]) -> IdTable:
    return np.array(list(values), np.int64), np.array(list(values.values()), np.float32)


EMPTY = _table({})


def _concatenate(tables: Sequence[IdTable]) -> tuple[Ids, Ids, Floats]:
    """Starts of the tables and end of the last one ``[len(tables) + 1]``, all ids, all values."""
    starts = np.cumsum([0, *(len(ids) for ids, _ in tables)], dtype=np.int64)
    return starts, np.concatenate([ids for ids, _ in tables]), np.concatenate([values for _, values in tables])
