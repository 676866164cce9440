"""Sampling of the next token of each row: temperature, top-k, top-p, min-p, with reproducible noise.

The noise of a token is a pure function of (seed, position, vocabulary id). So a sampled token depends
neither on the other rows of the batch, nor on retractions, nor on the backend.
"""

from __future__ import annotations

import torch

from trunkline.kernels.cpu.sampling.sample import SCRATCH, kernel, splitmix
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
    """Sampling in plain torch: sorts the vocabulary, then draws. Returns token ids, int64 [R].

    ``logits`` float32 [R, V]; -inf forbids a token. ``temperature``, ``top_p``, ``min_p`` float [R],
    ``top_k`` int [R] (below 1 = off), ``seed`` and ``position`` int64 [R].

    Let p = softmax(logits / temperature). Tokens are ordered by falling p, equal ones by id. A token is
    kept if it is among the first ``top_k``, if the tokens before it sum to less than ``top_p``, and if
    its p is at least ``min_p`` times the largest. All three filters look at the unfiltered p. One of the
    kept tokens is drawn with probability proportional to p. Temperature 0 takes the first token.
    The result is -1 for a row with a NaN or +inf, or in which all tokens are forbidden.

    The draw is the Gumbel-max trick in its exponential form: the token with the smallest
    ``-log(1 - u) / p`` wins, ``u`` being the token's :func:`noise`.
    """
    scores = logits.double()
    largest = scores.amax(-1)
    broken = ~torch.isfinite(largest)
    best = logits.argmax(-1)
    greedy = (temperature <= 0) | (top_k == 1)
    temperature = torch.where(greedy, 1.0, temperature.double())
    weights = torch.exp((scores - largest[:, None]) / temperature[:, None])
    ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    rank = torch.arange(logits.shape[1], device=logits.device)
    keep = rank < torch.where(top_k < 1, logits.shape[1], top_k)[:, None]
    keep &= before < top_p.double()[:, None] * ordered.sum(-1, keepdim=True)
    keep &= ordered >= min_p.double()[:, None]
    times = -torch.log1p(-noise(seed, position, ids).double()) / ordered
    drawn = ids.gather(-1, times.masked_fill(~keep | (ordered == 0), torch.inf).argmin(-1, keepdim=True))[:, 0]
    return torch.where(broken, -1, torch.where(greedy, best, drawn))


def noise(seed: torch.Tensor, position: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Uniform float32 [R, N] in the open interval (0, 1), for int64 ``seed`` and ``position`` [R] and ``ids`` [R, N].

    Two rounds of splitmix64 (Vigna) make a 64-bit key for each row. Two rounds of a 32-bit mixer over
    the id, with the key's halves, make the number.
    """
    key = splitmix(splitmix(seed) + position)
    low, high = (key & _LOW_32)[:, None], ((key >> 32) & _LOW_32)[:, None]
    mixed = _mix((_mix((ids + low) & _LOW_32) + high) & _LOW_32)
    return ((mixed >> 1).to(torch.float32).clamp_(max=2147483392.0) + 0.5) * 2.0**-31


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Bijective 32-bit mixing function with low bias, on uint32 values in int64 tensors."""
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
    """:func:`sample_reference`, compiled, without sorting: :mod:`.cpu.sample`. Each of torch's threads takes rows.

    Takes the same arguments, on the CPU, and converts their dtypes. ``logits`` may be of any float dtype.
    Lengths aren't checked.
    """
    rows, vocabulary = logits.shape
    logits = logits.contiguous().float()
    result = torch.empty(rows, dtype=torch.int64)
    temperature, top_p, min_p = (x.to(torch.float64).contiguous() for x in (temperature, top_p, min_p))
    top_k, seed, position = (x.to(torch.int64).contiguous() for x in (top_k, seed, position))
    team = team_size(rows > 1 and rows * vocabulary > _MIN_PARALLEL)
    scratch = torch.empty(team, vocabulary + SCRATCH, dtype=torch.float32)
    kernel().run(
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


_MIN_PARALLEL = 1 << 15  # logits; below, waking the other threads costs more than it saves
