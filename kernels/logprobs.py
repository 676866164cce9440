"""Log-probabilities of rows of logits: of chosen ids, of the most likely ids, and of ids that are asked for."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trunkline.kernels.cpu.sampling.logprobs import BLOCK, COLDEST, LOWEST, kernel
from trunkline.kernels.cpu.threads import team_size


class RowLogprobs(NamedTuple):
    """Natural logarithms, float32: ``chosen`` [Q], ``top`` [Q, k] largest first, ``ids`` [Q, N]; ``top_ids`` int32."""

    chosen: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor
    ids: torch.Tensor


def logprobs_reference(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperature: torch.Tensor,
    chosen: torch.Tensor,
    top: int,
    ids: torch.Tensor,
) -> RowLogprobs:
    """``log_softmax(logits / temperature)`` of ``rows``, at a few ids of each.

    ``logits`` float32 [R, V], -inf = forbidden. Of each row that is asked about: ``rows`` int64 [Q], its index in
    ``logits``; ``temperature`` float [Q]; ``chosen`` int64 [Q]; ``ids`` int64 [Q, N]. Ids outside [0, V) give
    NaN. ``top``: how many of the most likely ids, of equals the lower first (at most V are given).
    Temperature 0 means 1, and forbidden ids have -inf then; otherwise no value is below the lowest float32.
    A row with a NaN, with +inf or with nothing allowed gives NaN.
    """
    scores = logits[rows].double()
    largest = scores.amax(-1, keepdim=True)
    scaled = (temperature > 0)[:, None]
    heat = torch.where(scaled, temperature.double()[:, None].clamp(max=COLDEST), 1.0)
    values = ((scores - largest) / heat).log_softmax(-1).float()
    values = torch.where(scaled, values.clamp(min=float(LOWEST)), values)
    values = values.masked_fill(~torch.isfinite(largest), torch.nan)
    order = torch.empty(len(rows), 0, dtype=torch.int64, device=logits.device)
    if top:
        order = scores.argsort(dim=-1, descending=True, stable=True)[:, :top]
    return RowLogprobs(
        _at(values, chosen[:, None])[:, 0], order.to(torch.int32), values.gather(-1, order), _at(values, ids)
    )


def _at(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    last = values.shape[1] - 1
    return values.gather(-1, ids.clamp(0, last)).masked_fill((ids < 0) | (ids > last), torch.nan)


def logprobs_cpu(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperature: torch.Tensor,
    chosen: torch.Tensor,
    top: int,
    ids: torch.Tensor,
) -> RowLogprobs:
    """The same by compiled loops, rows shared out over torch's threads; nothing is sorted."""
    count, vocabulary = len(rows), logits.shape[1]
    top = min(top, vocabulary)
    logits = logits.contiguous().float()
    temperature = temperature.to(torch.float64).contiguous()
    rows, chosen, ids = (x.to(torch.int64).contiguous() for x in (rows, chosen, ids))
    result = RowLogprobs(
        torch.empty(count, dtype=torch.float32),
        torch.empty(count, top, dtype=torch.int32),
        torch.empty(count, top, dtype=torch.float32),
        torch.empty(count, ids.shape[1], dtype=torch.float32),
    )
    team = team_size(count > 1 and count * vocabulary > _SERIAL)
    scratch = torch.empty(team, BLOCK, dtype=torch.float32)
    kernel().run(
        team,
        logits=logits.data_ptr(),
        vocabulary=vocabulary,
        count=count,
        rows=rows.data_ptr(),
        temperature=temperature.data_ptr(),
        chosen=chosen.data_ptr(),
        top=top,
        asked=ids.shape[1],
        ids=ids.data_ptr(),
        chosen_result=result.chosen.data_ptr(),
        top_ids=result.top_ids.data_ptr(),
        top_result=result.top.data_ptr(),
        ids_result=result.ids.data_ptr(),
        scratch=scratch.data_ptr(),
        shares=team,
    )
    return result


_SERIAL = 1 << 15  # logits below which waking the other threads costs more than it saves
