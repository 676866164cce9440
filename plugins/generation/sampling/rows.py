"""Which rows of a pass must give more than a token, because a request wants log-probabilities or hidden states.

Row ``p`` of a prompt predicts its token ``p + 1``, which is known, so a chunk needs nothing of the next one. A request
may be computed again after a retraction: :class:`RowState` knows what it has sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec import structs

from trunkline.core.types import Needs, PartRow, Request
from trunkline.plugins.generation.extras import check_asked_ids
from trunkline.plugins.generation.schemas import GenerationParams, LogprobParams

from .experts import Choices


@dataclass(slots=True)
class RowState:
    """What one request gets beside tokens, and how much of it has been sent.

    Rows ``[due, prompt_len - 1)`` give log-probabilities of the prompt that are still to be sent. Hidden rows are
    sent from the first one that is computed; ``hidden_due`` is the next position, None before the first.
    """

    prompt_len: int
    logprobs: LogprobParams | None
    hidden: str  # "", "last" or "all"
    choices: Choices | None
    due: int
    hidden_due: int | None = None

    def added_to(self, needs: Needs) -> Needs:
        """``needs`` with the rows that are still to be sent, and with as much reuse as leaves them to be computed."""
        rows: list[int] = []
        reuse: list[int] = []
        if self.due < self.prompt_len - 1:
            rows.append(self.due)
            reuse.append(self.due)
        if self.hidden == "all":
            if self.hidden_due is None:
                rows.append(0)  # those that aren't cached
            elif self.hidden_due < self.prompt_len:
                rows.append(self.hidden_due)
                reuse.append(self.hidden_due)
        if self.choices is not None:
            reuse.append(self.choices.seen)
        return structs.replace(needs, rows_from=min(rows, default=None), reuse_up_to=min(reuse, default=None))

    def sent(self, row: PartRow) -> None:
        """What ``row`` gave is on its way."""
        self.due = max(self.due, min(row.end, self.prompt_len - 1))
        self.hidden_due = row.end


def row_state(request: Request, vocabulary: int, keep: Callable[[int], Choices]) -> RowState | None:
    """The state of a request that wants more than tokens, else None.

    ``keep(start)`` begins to keep its expert choices. RequestError for ids outside the vocabulary.
    """
    params: GenerationParams = request.params
    logprobs, last = params.logprobs, request.prompt_len - 1
    if logprobs is None and not params.hidden_states and params.experts_from is None:
        return None
    due = last
    if logprobs is not None:
        check_asked_ids(logprobs.ids, vocabulary)
        due = last if logprobs.start is None else min(logprobs.start, last)
    choices = None if params.experts_from is None else keep(params.experts_from)
    return RowState(request.prompt_len, logprobs, params.hidden_states, choices, due)


class Span(NamedTuple):
    """Rows ``[begin, end)`` of a tensor belong to a request; the first is about ``position``."""

    begin: int
    end: int
    position: int


@dataclass(slots=True)
class Asked:
    """Rows whose log-probabilities are wanted: requests one after another, rows of each together."""

    params: dict[int, LogprobParams] = field(default_factory=dict)  # by the request's place in the part, in order
    spans: dict[int, Span] = field(default_factory=dict)
    at: list[int] = field(default_factory=list)  # where each row is
    targets: list[int] = field(default_factory=list)  # whose log-probability each row tells; of prompts only

    def add(self, place: int, params: LogprobParams, at: Sequence[int], position: int) -> None:
        self.params[place] = params
        self.spans[place] = Span(len(self.at), len(self.at) + len(at), position)
        self.at.extend(at)


@dataclass(slots=True)
class PassPlan:
    """The rows of a part in which some request wants more than a token.

    ``sampled`` get a token; ``places`` says where they are in the part. ``output`` has places among the sampled rows,
    ``prompt`` and ``hidden_at`` among the part's hidden rows.
    """

    sampled: list[PartRow] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    output: Asked = field(default_factory=Asked)
    prompt: Asked = field(default_factory=Asked)
    hidden: dict[int, Span] = field(default_factory=dict)
    hidden_at: list[int] = field(default_factory=list)

    def add(self, place: int, row: PartRow) -> None:
        """The next row of the part."""
        state: RowState | None = row.request.state.rows
        logprobs = None if state is None else state.logprobs
        if row.final and (row.request.state.limit or logprobs is not None):
            if logprobs is not None:
                self.output.add(place, logprobs, [len(self.sampled)], row.end)
            self.sampled.append(row)
            self.places.append(place)
        if state is None:
            return
        first, end = max(row.first, state.due), min(row.end, state.prompt_len - 1)
        if logprobs is not None and first < end:
            self.prompt.add(place, logprobs, _hidden_rows(row, first, end), first + 1)
            self.prompt.targets.extend(row.request.tokens[first + 1 : end + 1])
        if state.hidden == "all" or (state.hidden and row.final):
            first = row.end - 1 if state.hidden == "last" else max(row.first, state.hidden_due or 0)
            self.hidden[place] = Span(len(self.hidden_at), len(self.hidden_at) + row.end - first, first)
            self.hidden_at.extend(_hidden_rows(row, first, row.end))


def _hidden_rows(row: PartRow, first: int, end: int) -> range:
    """Where among the part's hidden rows a request's positions ``[first, end)`` are."""
    start = row.offset + first - row.first
    return range(start, start + end - first)


def plan_pass(rows: Sequence[PartRow]) -> PassPlan | None:
    """None where nobody wants more than tokens."""
    if all(row.request.state.rows is None for row in rows):
        return None
    plan = PassPlan()
    for place, row in enumerate(rows):
        plan.add(place, row)
    return plan
