"""Draw the next token of each row: temperature, top-k, top-p, min-p, reproducible noise.

The noise of a token is a pure function of (seed, position, vocabulary id), so a draw doesn't
depend on batch-mates, on retraction or on the backend.
"""

from __future__ import annotations

import torch

from trunkline.kernels.cpu.sampling.sample import SCRATCH, splitmix, task
from trunkline.kernels.cpu.threads import team_size

_LOW_32 = 0xFFFFFFFF


def sample_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """Plain torch: sort everything, draw by the exponential race. Returns int64 [R].

    ``logits`` float32 [R, V], -inf = forbidden. ``temperature``, ``top_p``, ``min_p`` float [R],
    ``top_k`` int [R] (< 1 = off), ``seed`` and ``position`` int64 [R].
    With p = softmax(logits / temperature), ordered by p, then by lower id, a token stays iff it is
    among the first ``top_k``, the tokens before it hold less than ``top_p`` together, and its p is
    at least ``min_p`` times the largest. Temperature 0 takes the first of that order.
    A row with a NaN, with +inf or with nothing allowed gives -1.
    """
    scores = logits.double()
    largest = scores.amax(-1)
    broken = ~torch.isfinite(largest)
    best = logits.argmax(-1)
    greedy = (temperature <= 0) | (top_k == 1)
    heat = torch.where(greedy, 1.0, temperature.double())
    weights = torch.exp((scores - largest[:, None]) / heat[:, None])
    ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    rank = torch.arange(logits.shape[1], device=logits.device)
    keep = rank < torch.where(top_k < 1, logits.shape[1], top_k)[:, None]
    keep &= before < top_p.double()[:, None] * ordered.sum(-1, keepdim=True)
    keep &= ordered >= min_p.double()[:, None]
    waits = -torch.log1p(-noise(seed, position, ids).double()) / ordered
    drawn = ids.gather(-1, waits.masked_fill(~keep | (ordered == 0), torch.inf).argmin(-1, keepdim=True))[:, 0]
    return torch.where(broken, -1, torch.where(greedy, best, drawn))


def noise(seed: torch.Tensor, position: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Uniform float32 in (0, 1), [R, N], for int64 ``seed`` and ``position`` [R] and ``ids`` [R, N].

    A 64-bit key a row (two splitmix64 rounds), then two rounds of a 32-bit mixer over the id.
    """
    key = splitmix(splitmix(seed) + position)
    low, high = (key & _LOW_32)[:, None], ((key >> 32) & _LOW_32)[:, None]
    mixed = _mix((_mix((ids + low) & _LOW_32) + high) & _LOW_32)
    return ((mixed >> 1).to(torch.float32).clamp_(max=2147483392.0) + 0.5) * 2.0**-31


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijective 32-bit mixer with low bias, on int64 that holds uint32."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _LOW_32
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & _LOW_32
    return x ^ (x >> 15)


def sample_cpu(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """The same by compiled loops, rows shared out over torch's threads; nothing is sorted."""
    rows, vocabulary = logits.shape
    logits = logits.contiguous().float()
    result = torch.empty(rows, dtype=torch.int64)
    temperature, top_p, min_p = (x.to(torch.float64).contiguous() for x in (temperature, top_p, min_p))
    top_k, seed, position = (x.to(torch.int64).contiguous() for x in (top_k, seed, position))
    team = team_size(rows > 1 and rows * vocabulary > _SERIAL)
    scratch = torch.empty(team, vocabulary + SCRATCH, dtype=torch.float32)
    task().run(
        team,
        logits=logits.data_ptr(),
        rows=rows,
        vocabulary=vocabulary,
        result=result.data_ptr(),
        scratch=scratch.data_ptr(),
        shares=team,
        temperature=temperature.data_ptr(),
        top_p=top_p.data_ptr(),
        min_p=min_p.data_ptr(),
        top_k=top_k.data_ptr(),
        seed=seed.data_ptr(),
        position=position.data_ptr(),
    )
    return result


_SERIAL = 1 << 15  # logits below which waking the other threads costs more than it saves
