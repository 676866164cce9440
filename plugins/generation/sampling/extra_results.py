"""Extra outputs of the rows that :mod:`.extra_rows` selects: computed on the device, then cut into results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest

import numpy as np
import torch
from msgspec import structs

from trunkline.core.types import PartRow, Step
from trunkline.kernels.logprobs import RowLogprobs
from trunkline.plugins.generation.schemas import GenerationResult, LogprobParams, LogprobTable

from .extra_rows import ExtraState, LogprobRows, RowSelection

SLICE = 32 << 20  # bytes of a prompt's logits, and of the results computed from them, that are in memory at a time
PIECE = 16 << 20  # bytes of each kind of output in one result

Head = Callable[[torch.Tensor], torch.Tensor]
Kernel = Callable[..., RowLogprobs]

# -- on the device -----------------------------------------------------------------------------


def output_logprobs(
    selected: LogprobRows,
    inputs: Mapping[str, torch.Tensor],
    logits: torch.Tensor,
    sampled: torch.Tensor,
    kernel: Kernel,
) -> dict[str, torch.Tensor]:
    """Log-probabilities of the sampled ids, and of other ids at these positions.

    The ids ``sampled``, int64 ``[S]``, were sampled from ``logits``, float32 ``[S, V]``.
    """
    rows, ids = inputs["output.rows"], inputs["output.ids"]
    temperature = inputs["temperature"]
    logprobs: RowLogprobs = kernel(logits, rows, temperature[rows], sampled[rows], _max_top(selected), ids)
    return {f"output.{name}": tensor for name, tensor in logprobs._asdict().items()}


def prompt_logprobs(
    selected: LogprobRows,
    inputs: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    head: Head,
    vocab_size: int,
    kernel: Kernel,
) -> dict[str, torch.Tensor]:
    """Log-probabilities of prompt tokens, from hidden rows ``[R, hidden_size]``; no sampling parameter applies.

    The head runs over a slice of the rows at a time, because the logits of all would need much memory.
    """
    device, top, ids = hidden.device, _max_top(selected), inputs["prompt.ids"]
    indices, targets, owners = inputs["prompt.rows"], inputs["prompt.targets"], inputs["prompt.owners"]
    step = max(1, SLICE // (4 * vocab_size + 8 * top + 12 * ids.shape[1]))
    temperature, rows = torch.zeros(step, device=device), torch.arange(step, device=device)
    pieces: list[RowLogprobs] = []
    for first in range(0, len(indices), step):
        part = slice(first, first + step)
        logits = head(hidden[indices[part]]).float()
        n = len(logits)
        pieces.append(kernel(logits, rows[:n], temperature[:n], targets[part], top, ids[owners[part]]))
    return {f"prompt.{name}": torch.cat([getattr(piece, name) for piece in pieces]) for name in RowLogprobs._fields}


def _max_top(selected: LogprobRows) -> int:
    """The largest ``top`` of the requests; the results of others are cut to their own."""
    return max(params.top for params in selected.params.values())


def hidden_states(inputs: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Copies of the selected hidden rows, float32 ``[rows, hidden_size]``."""
    return {"hidden": hidden[inputs["hidden.rows"]].float()}


# -- on the host -------------------------------------------------------------------------------


class PartResults:
    """Cuts the tensors of a part into the results of its requests."""

    def __init__(self, selection: RowSelection, tensors: Mapping[str, torch.Tensor], weights_id: int) -> None:
        """``weights_id``: of the weights that computed ``tensors``."""
        self._selection = selection
        self._weights_id = weights_id
        self._values = {name: tensor.numpy() for name, tensor in tensors.items()}

    def of(self, index: int, row: PartRow, token: int, step: Step) -> list[GenerationResult]:
        """The results of the part's row ``index``, for which ``token`` was sampled; the last belongs to ``step``."""
        state: ExtraState = row.request.state.extras
        ended = step.finish is not None
        grammar = row.request.state.grammar
        may_end = ended or (grammar is not None and grammar.behind)
        hidden = self._hidden(index) if may_end or state.hidden == "all" else iter(())
        experts = _experts(state, row.end if step.tokens else row.end - 1) if ended else iter(())
        of_prompt = state.logprobs is not None and state.logprobs.start is not None
        weights_id = self._weights_id if of_prompt else 0
        results = [
            GenerationResult(
                prompt=table,
                first=first,
                hidden=rows,
                hidden_at=hidden_at,
                experts=ids,
                weights_id=weights_id,
            )
            for (table, first), (rows, hidden_at), ids in _side_by_side(self._prompt(index), hidden, experts)
        ]
        if (span := self._selection.output.spans.get(index)) is not None:
            table = self._table("output", self._selection.output.params[index], span.begin, span.end)
            table = structs.replace(table, chosen_ids=np.int32(token).tobytes())
            *before, last = results or [GenerationResult(weights_id=weights_id)]
            results = [*before, structs.replace(last, output=table)]
        if results and state.restart:
            results[0] = structs.replace(results[0], restart=True)
        return results

    def _prompt(self, index: int) -> Iterator[tuple[LogprobTable, int]]:
        """Tables of prompt tokens, each with the position of its first token."""
        span = self._selection.prompt.spans.get(index)
        if span is not None:
            params = self._selection.prompt.params[index]
            for begin, end in _pieces(span.begin, span.end, 4 + 8 * params.top + 4 * len(params.ids)):
                yield self._table("prompt", params, begin, end), span.position + begin - span.begin

    def _hidden(self, index: int) -> Iterator[tuple[bytes, int]]:
        """Hidden states, each piece with its first position."""
        span = self._selection.hidden.get(index)
        if span is not None:
            rows = self._values["hidden"]
            for begin, end in _pieces(span.begin, span.end, 4 * rows.shape[1]):
                yield rows[begin:end].tobytes(), span.position + begin - span.begin

    def _table(self, kind: str, params: LogprobParams, begin: int, end: int) -> LogprobTable:
        """Rows ``[begin, end)``; their columns, which suffice for all requests, are cut to those of this request."""
        chosen, top_ids, top, ids = (self._values[f"{kind}.{name}"][begin:end] for name in RowLogprobs._fields)
        return LogprobTable(
            chosen=chosen.tobytes(),
            top_ids=top_ids[:, : params.top].tobytes(),
            top=top[:, : params.top].tobytes(),
            ids=ids[:, : len(params.ids)].tobytes(),
        )


def _experts(state: ExtraState, end: int) -> Iterator[bytes]:
    """Routed experts of positions before ``end``, in pieces."""
    if state.experts is not None:
        ids = state.experts.read(end)
        row_bytes = max(1, ids[:1].nbytes)
        for begin, stop in _pieces(0, len(ids), row_bytes):
            yield ids[begin:stop].tobytes()


def _pieces(begin: int, end: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """The rows ``[begin, end)`` in ranges of at most ``PIECE`` bytes."""
    step = max(1, PIECE // row_bytes)
    for start in range(begin, end, step):
        yield start, min(start + step, end)


def _side_by_side(
    prompt: Iterator[tuple[LogprobTable, int]], hidden: Iterator[tuple[bytes, int]], experts: Iterator[bytes]
) -> Iterator[tuple[tuple[LogprobTable | None, int], tuple[bytes, int], bytes]]:
    """The pieces of each kind with those of the others, and empty ones where a kind has no more."""
    for table, rows, ids in zip_longest(prompt, hidden, experts):
        yield table or (None, 0), rows or (b"", 0), ids or b""
