"""From hidden rows and logits to what :mod:`.rows` plans: on the device, and then as results for the front."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest

import numpy as np
import torch
from msgspec import structs

from trunkline.core.types import PartRow, Step
from trunkline.kernels.logprobs import RowLogprobs
from trunkline.plugins.generation.schemas import GenerationResult, LogprobParams, LogprobTable

from .rows import Asked, PassPlan, RowState, Span

SLICE = 32 << 20  # bytes of logits in memory at a time, with what is asked of them
PIECE = 16 << 20  # bytes of one kind in one result

Head = Callable[[torch.Tensor], torch.Tensor]
Kernel = Callable[..., RowLogprobs]

# -- on the device -----------------------------------------------------------------------------


def output_logprobs(
    asked: Asked, logits: torch.Tensor, temperature: torch.Tensor, sampled: torch.Tensor, kernel: Kernel
) -> dict[str, torch.Tensor]:
    """Log-probabilities of sampled ids.

    ``logits`` float32 ``[S, V]`` are those that were sampled from, ``temperature`` ``[S]``, ``sampled`` int64 ``[S]``.
    """
    device = logits.device
    rows = torch.tensor(asked.at, device=device)
    found = kernel(logits, rows, temperature[rows], sampled[rows], _widest_top(asked), _asked_ids(asked, device))
    return {f"output.{name}": tensor for name, tensor in found._asdict().items()}


def prompt_logprobs(
    asked: Asked, hidden: torch.Tensor, head: Head, vocabulary: int, kernel: Kernel
) -> dict[str, torch.Tensor]:
    """Log-probabilities of prompts' tokens, from hidden rows ``[R, hidden_size]``.

    Their logits would be large, so the head runs over some rows at a time. Sampling parameters don't touch them.
    """
    device, top, ids = hidden.device, _widest_top(asked), _asked_ids(asked, hidden.device)
    at, targets = torch.tensor(asked.at, device=device), torch.tensor(asked.targets, device=device)
    lengths = [span.end - span.begin for span in asked.spans.values()]
    owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device)
    step = max(1, SLICE // (4 * vocabulary + 8 * top + 12 * ids.shape[1]))
    plain, every = torch.zeros(step, device=device), torch.arange(step, device=device)
    pieces: list[RowLogprobs] = []
    for first in range(0, len(at), step):
        some = slice(first, first + step)
        logits = head(hidden[at[some]]).float()
        n = len(logits)
        pieces.append(kernel(logits, every[:n], plain[:n], targets[some], top, ids[owner[some]]))
    return {f"prompt.{name}": torch.cat([getattr(piece, name) for piece in pieces]) for name in RowLogprobs._fields}


def _widest_top(asked: Asked) -> int:
    """The most that a request wants; others take less of it."""
    return max(params.top for params in asked.params.values())


def _asked_ids(asked: Asked, device: torch.device) -> torch.Tensor:
    """int64 ``[requests, N]``, filled up with -1."""
    lists = [params.ids for params in asked.params.values()]
    table = np.full((len(lists), max(map(len, lists))), -1, np.int64)
    for row, ids in zip(table, lists, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(table).to(device)


def hidden_rows(at: Sequence[int], hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """float32 ``[len(at), hidden_size]``."""
    return {"hidden": hidden[torch.tensor(at, device=hidden.device)].float()}


# -- on the host -------------------------------------------------------------------------------


class PassResults:
    """The tensors of a pass, cut into the results of its requests."""

    def __init__(self, plan: PassPlan, tensors: Mapping[str, torch.Tensor]) -> None:
        self._plan = plan
        self._values = {name: tensor.numpy() for name, tensor in tensors.items()}

    def of(self, place: int, row: PartRow, token: int, step: Step) -> list[GenerationResult]:
        """Those of the request at ``place`` in the part, which got ``token``; the last goes with ``step``."""
        state: RowState = row.request.state.rows
        ended = step.finish is not None
        hidden = self._hidden(place) if ended or state.hidden == "all" else iter(())
        experts = _experts(state, row.end if step.tokens else row.end - 1) if ended else iter(())
        results = [
            GenerationResult(prompt=table, first=first, hidden=rows, hidden_at=at, experts=chosen)
            for (table, first), (rows, at), chosen in _together(self._prompt(place), hidden, experts)
        ]
        if (span := self._plan.output.spans.get(place)) is not None:
            table = self._table("output", self._plan.output.params[place], span.begin, span.end)
            table = structs.replace(table, chosen_ids=np.int32(token).tobytes())
            *before, last = results or [GenerationResult()]
            results = [*before, structs.replace(last, output=table)]
        return results

    def _prompt(self, place: int) -> Iterator[tuple[LogprobTable, int]]:
        """Tables of a prompt's rows, each with the position of its first token."""
        span = self._plan.prompt.spans.get(place)
        if span is not None:
            params = self._plan.prompt.params[place]
            for begin, end in _cut(span, 4 + 8 * params.top + 4 * len(params.ids)):
                yield self._table("prompt", params, begin, end), span.position + begin - span.begin

    def _hidden(self, place: int) -> Iterator[tuple[bytes, int]]:
        """Hidden rows, each piece with its first position."""
        span = self._plan.hidden.get(place)
        if span is not None:
            rows = self._values["hidden"]
            for begin, end in _cut(span, 4 * rows.shape[1]):
                yield rows[begin:end].tobytes(), span.position + begin - span.begin

    def _table(self, kind: str, params: LogprobParams, begin: int, end: int) -> LogprobTable:
        """Rows ``[begin, end)``; of what the widest request wants, as much as this one does."""
        chosen, top_ids, top, ids = (self._values[f"{kind}.{name}"][begin:end] for name in RowLogprobs._fields)
        return LogprobTable(
            chosen=chosen.tobytes(),
            top_ids=top_ids[:, : params.top].tobytes(),
            top=top[:, : params.top].tobytes(),
            ids=ids[:, : len(params.ids)].tobytes(),
        )


def _experts(state: RowState, end: int) -> Iterator[bytes]:
    """The choices at positions before ``end``."""
    if state.choices is not None:
        chosen = state.choices.take(end)
        width = max(1, chosen[:1].nbytes)
        for begin, stop in _cut(Span(0, len(chosen), 0), width):
            yield chosen[begin:stop].tobytes()


def _cut(span: Span, width: int) -> Iterator[tuple[int, int]]:
    """A span in pieces of at most ``PIECE`` bytes, of rows of ``width`` bytes."""
    step = max(1, PIECE // width)
    for begin in range(span.begin, span.end, step):
        yield begin, min(begin + step, span.end)


def _together(
    prompt: Iterator[tuple[LogprobTable, int]], hidden: Iterator[tuple[bytes, int]], experts: Iterator[bytes]
) -> Iterator[tuple[tuple[LogprobTable | None, int], tuple[bytes, int], bytes]]:
    """The pieces of all kinds side by side."""
    for table, rows, chosen in zip_longest(prompt, hidden, experts):
        yield table or (None, 0), rows or (b"", 0), chosen or b""
