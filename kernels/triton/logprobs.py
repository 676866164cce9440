"""Log-probabilities of chosen ids and of the most likely ones: one program per row, without a copy of the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trunkline.kernels.cpu.sampling.logprobs import LOWEST
from trunkline.kernels.logprobs import RowLogprobs, logprobs_reference

from . import plans
from .elements import LOG2E
from .launch import architecture
from .sample import MAX_TEMPERATURE, MIN_TEMPERATURE, find_largest

MAX_TOP = 64  # each of the most likely ids takes a pass over the row; beyond, sorting is faster
LEAST = tl.constexpr(float(LOWEST))


def logprobs(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperature: torch.Tensor,
    chosen: torch.Tensor,
    top: int,
    ids: torch.Tensor,
) -> RowLogprobs:
    """:func:`trunkline.kernels.logprobs.logprobs_reference` as a Triton kernel; ``logits`` of any float dtype.

    Sums are float32. More than ``MAX_TOP`` of the most likely ids are computed by the reference.
    """
    count, vocabulary, top = len(rows), logits.shape[1], min(top, logits.shape[1])
    if top > MAX_TOP or not count:
        return logprobs_reference(logits, rows, temperature, chosen, top, ids)
    result = RowLogprobs(
        torch.empty(count, dtype=torch.float32, device=logits.device),
        torch.empty(count, top, dtype=torch.int32, device=logits.device),
        torch.empty(count, top, dtype=torch.float32, device=logits.device),
        torch.empty(count, ids.shape[1], dtype=torch.float32, device=logits.device),
    )
    plan = plans.vocabulary(architecture(), vocabulary)
    logprobs_kernel[(count,)](
        logits.contiguous(), rows, temperature, chosen, ids.contiguous(), *result, top, ids.shape[1],
        VOCABULARY=vocabulary, BLOCK_N=plan.block_n, BLOCK_IDS=64, num_warps=plan.warps,
    )  # fmt: skip
    return result


@triton.jit
def value_at(
    x: tl.tensor, largest: tl.tensor, scale: tl.tensor, log_total: tl.tensor, scaled: tl.tensor, broken: tl.tensor
) -> tl.tensor:
    """The log-probability of a logit ``x``."""
    value = (x - largest) * scale - log_total
    value = tl.where(scaled, tl.maximum(value, LEAST), value)
    return tl.where(broken, float("nan"), value)


@triton.jit
def next_largest(
    logits: tl.tensor, last: tl.tensor, last_id: tl.tensor, VOCABULARY: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(logit, id) after ``last`` in the order of falling logits, equal ones by id. NaN comes last."""
    best, best_id = -float("inf"), VOCABULARY + 0
    for start in range(0, VOCABULARY, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        x = tl.load(logits + column, column < VOCABULARY, other=-float("inf")).to(tl.float32)
        x = tl.where(x == x, x, -float("inf"))
        after = (column < VOCABULARY) & ((x < last) | ((x == last) & (column > last_id)))
        block_best = tl.max(tl.where(after, x, -float("inf")), 0)
        block_id = tl.min(tl.where(after & (x == block_best), column, VOCABULARY), 0)
        better = (block_id < VOCABULARY) & ((block_best > best) | (best_id == VOCABULARY))
        best, best_id = tl.where(better, block_best, best), tl.where(better, block_id, best_id)
    return best, best_id


@triton.jit(
    do_not_specialize=(
        "rows", "temperature", "chosen", "ids", "out_chosen", "out_top_ids", "out_top", "out_ids", "top", "id_count",
    ),
)  # fmt: skip
def logprobs_kernel(
    logits: tl.tensor, rows: tl.tensor, temperature: tl.tensor, chosen: tl.tensor, ids: tl.tensor,
    out_chosen: tl.tensor, out_top_ids: tl.tensor, out_top: tl.tensor, out_ids: tl.tensor, top: tl.tensor,
    id_count: tl.tensor, VOCABULARY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_IDS: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (rows with log-probabilities)."""
    item = tl.program_id(0).to(tl.int64)
    logits += tl.load(rows + item) * VOCABULARY
    largest, _, broken = find_largest(logits, VOCABULARY, BLOCK_N)
    largest = tl.where(broken, 0.0, largest)
    row_temperature = tl.load(temperature + item).to(tl.float32)
    scaled = row_temperature > 0
    scale = 1.0 / tl.where(scaled, tl.minimum(tl.maximum(row_temperature, MIN_TEMPERATURE), MAX_TEMPERATURE), 1.0)
    total = 0.0
    for start in range(0, VOCABULARY, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        x = tl.load(logits + column, column < VOCABULARY, other=-float("inf")).to(tl.float32)
        total += tl.sum(tl.exp2((x - largest) * scale * LOG2E), 0)
    log_total = tl.log(tl.where(broken, 1.0, total))
    token = tl.load(chosen + item)
    known = (token >= 0) & (token < VOCABULARY)
    score = tl.load(logits + token, known, other=0.0).to(tl.float32)
    value = value_at(score, largest, scale, log_total, scaled, broken)
    tl.store(out_chosen + item, tl.where(known, value, float("nan")))
    for start in range(0, id_count, BLOCK_IDS):
        at = start + tl.arange(0, BLOCK_IDS)
        tokens = tl.load(ids + item * id_count + at, at < id_count, other=-1)
        inside = (tokens >= 0) & (tokens < VOCABULARY)
        scores = tl.load(logits + tokens, inside, other=0.0).to(tl.float32)
        values = value_at(scores, largest, scale, log_total, scaled, broken)
        tl.store(out_ids + item * id_count + at, tl.where(inside, values, float("nan")), at < id_count)
    last, last_id = float("inf"), -1
    for rank in range(0, top):
        last, last_id = next_largest(logits, last, last_id, VOCABULARY, BLOCK_N)
        tl.store(out_top_ids + item * top + rank, last_id)
        tl.store(out_top + item * top + rank, value_at(last, largest, scale, log_total, scaled, broken))
