"""Selects the rows of a pass from which extra outputs are computed: log-probabilities and hidden states.

The hidden row of position ``p`` predicts the token at ``p + 1``. For a prompt that token is known, so a chunk needs
nothing of the next chunk::

    position          0     1     2  …  n-2   n-1
    prompt token      t0    t1    t2 …  tn-2  tn-1
    row predicts      t1    t2    t3 …  tn-1  first output token

A request may be computed again after a retraction: :class:`ExtraState` has how much was sent before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from msgspec import structs

from trunkline.core.types import Needs, PartRow, Request
from trunkline.plugins.generation.extras import check_logprob_ids
from trunkline.plugins.generation.schemas import GenerationParams, LogprobParams

from .routed_experts import RoutedExperts


@dataclass(slots=True)
class ExtraState:
    """The extra outputs of one request, and how much of them has been sent.

    Rows ``[logprobs_due, prompt_len - 1)`` give the log-probabilities of prompt tokens that are still to be sent.
    Hidden states are sent from the first computed row on; ``hidden_due`` is the next position to send, None before
    the first. ``restart``: the next result tells the front to drop what it has of the prompt.
    """

    prompt_len: int
    logprobs: LogprobParams | None
    hidden: str  # "", "last" or "all"
    experts: RoutedExperts | None
    logprobs_due: int
    restart: bool
    hidden_due: int | None = None

    def added_to(self, needs: Needs) -> Needs:
        """``needs`` with the rows that are still to be sent; what is cached of them must be computed again."""
        rows: list[int] = []
        reuse: list[int] = []
        if self.logprobs_due < self.prompt_len - 1:
            rows.append(self.logprobs_due)
            reuse.append(self.logprobs_due)
        if self.hidden == "all":
            if self.hidden_due is None:
                rows.append(0)  # of all positions that aren't cached
            elif self.hidden_due < self.prompt_len:
                rows.append(self.hidden_due)
                reuse.append(self.hidden_due)
        if self.experts is not None:
            reuse.append(self.experts.known_end)
        return structs.replace(needs, rows_from=min(rows, default=None), reuse_up_to=min(reuse, default=None))

    def mark_sent(self, row: PartRow) -> None:
        """The extra outputs of ``row`` have been returned to the engine."""
        self.logprobs_due = max(self.logprobs_due, min(row.end, self.prompt_len - 1))
        self.hidden_due = row.end
        self.restart = False

    def restarted(self) -> ExtraState:
        """The state of a request that is computed anew with other weights."""
        due = first_logprobs_row(self.logprobs, self.prompt_len)
        return ExtraState(self.prompt_len, self.logprobs, self.hidden, self.experts, due, restart=True)


def first_logprobs_row(logprobs: LogprobParams | None, prompt_len: int) -> int:
    """The first row whose prompt token's log-probability is requested; ``prompt_len - 1`` if there is none."""
    last = prompt_len - 1
    return last if logprobs is None or logprobs.start is None else min(logprobs.start, last)


def make_extra_state(
    request: Request, vocab_size: int, weights_id: int, capture_experts: Callable[[int], RoutedExperts]
) -> ExtraState | None:
    """The state of a request with extra outputs, None if there are none.

    ``weights_id``: of the weights that will compute it. ``capture_experts(start)`` begins to capture its routed
    experts. RequestError for ids outside the vocabulary.
    """
    params: GenerationParams = request.params
    logprobs = params.logprobs
    if logprobs is None and not params.hidden_states and params.experts_from is None:
        return None
    due, known = first_logprobs_row(logprobs, request.prompt_len), None
    if logprobs is not None:
        check_logprob_ids(logprobs.ids, vocab_size)
        known = logprobs.prompt_known
    if known == weights_id:
        due = request.prompt_len - 1
    restart = known not in (None, weights_id)  # the weights were updated after the prompt was computed
    experts = None if params.experts_from is None else capture_experts(params.experts_from)
    return ExtraState(request.prompt_len, logprobs, params.hidden_states, experts, due, restart)


class Span(NamedTuple):
    """Rows ``[begin, end)`` of a tensor belong to one request; ``position`` is that of the first one's token."""

    begin: int
    end: int
    position: int


@dataclass(slots=True)
class LogprobRows:
    """Rows from which log-probabilities are computed, request by request.

    ``params`` and ``spans`` have the request's index in the part as key. A span is a range of
    ``indices``.
    """

    params: dict[int, LogprobParams] = field(default_factory=dict)
    spans: dict[int, Span] = field(default_factory=dict)
    indices: list[int] = field(default_factory=list)  # of the rows in the tensor of logits, or of hidden rows
    targets: list[int] = field(default_factory=list)  # the id whose log-probability a row gives; for prompts only

    def arrays(self, kind: str) -> dict[str, np.ndarray]:
        """For the device, by names that begin with ``kind``: int64 "rows" and "targets" ``[rows]``, "owners"
        ``[rows]``, the request of each, and "ids" ``[requests, N]``, their ``LogprobParams.ids``, padded with -1."""
        lists = [params.ids for params in self.params.values()]
        ids = np.full((len(lists), max(map(len, lists), default=0)), -1, np.int64)
        for row, own in zip(ids, lists, strict=True):
            row[: len(own)] = own
        lengths = [span.end - span.begin for span in self.spans.values()]
        return {
            f"{kind}.rows": np.array(self.indices, np.int64),
            f"{kind}.targets": np.array(self.targets, np.int64),
            f"{kind}.owners": np.repeat(np.arange(len(lengths)), lengths),
            f"{kind}.ids": ids,
        }

    def add(self, index: int, params: LogprobParams, rows: Sequence[int], position: int) -> None:
        self.params[index] = params
        self.spans[index] = Span(len(self.indices), len(self.indices) + len(rows), position)
        self.indices.extend(rows)


@dataclass(slots=True)
class RowSelection:
    """The rows of a part that are used for each kind of output, if any of its requests has extra outputs.

    Indices in ``output`` count the sampled rows; those in ``prompt`` and ``hidden_indices`` count the part's hidden
    rows.
    """

    sampled: list[PartRow] = field(default_factory=list)  # rows for which a token is sampled
    sampled_indices: list[int] = field(default_factory=list)  # of these rows in the part
    output: LogprobRows = field(default_factory=LogprobRows)
    prompt: LogprobRows = field(default_factory=LogprobRows)
    hidden: dict[int, Span] = field(default_factory=dict)  # spans of hidden_indices, by the request's index in the part
    hidden_indices: list[int] = field(default_factory=list)

    def arrays(self) -> dict[str, np.ndarray]:
        """The selection for the device, int64."""
        arrays = {
            "sampled.rows": np.array(self.sampled_indices, np.int64),
            "hidden.rows": np.array(self.hidden_indices, np.int64),
        }
        return arrays | self.output.arrays("output") | self.prompt.arrays("prompt")

    def add(self, index: int, row: PartRow) -> None:
        """Add the part's row ``index``."""
        state: ExtraState | None = row.request.state.extras
        logprobs = None if state is None else state.logprobs
        if row.final and (row.request.state.limit or logprobs is not None):
            if logprobs is not None:
                self.output.add(index, logprobs, [len(self.sampled)], row.end)
            self.sampled.append(row)
            self.sampled_indices.append(index)
        if state is None:
            return
        first, end = max(row.first, state.logprobs_due), min(row.end, state.prompt_len - 1)
        if logprobs is not None and first < end:
            self.prompt.add(index, logprobs, _hidden_indices(row, first, end), first + 1)
            self.prompt.targets.extend(row.request.tokens[first + 1 : end + 1])
        if state.hidden == "all" or (state.hidden and row.final):
            first = row.end - 1 if state.hidden == "last" else max(row.first, state.hidden_due or 0)
            self.hidden[index] = Span(len(self.hidden_indices), len(self.hidden_indices) + row.end - first, first)
            self.hidden_indices.extend(_hidden_indices(row, first, row.end))


def _hidden_indices(row: PartRow, first: int, end: int) -> range:
    """Indices of a request's positions ``[first, end)`` among the part's hidden rows."""
    start = row.offset + first - row.first
    return range(start, start + end - first)


def select_rows(rows: Sequence[PartRow]) -> RowSelection | None:
    """The selection for a part with these rows; None if no request has extra outputs."""
    if all(row.request.state.extras is None for row in rows):
        return None
    selection = RowSelection()
    for index, row in enumerate(rows):
        selection.add(index, row)
    return selection
