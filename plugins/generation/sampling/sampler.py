"""The operation that samples tokens, and its result."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Sampler(Protocol):
    """The operation of ``kernels.sample``: ids int64 ``[R]`` from float32 logits ``[R, V]``.

    The id is -1 for a row with NaN, infinity or no finite logit.
    """

    def __call__(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        seed: torch.Tensor,
        position: torch.Tensor,
        /,
    ) -> torch.Tensor: ...


class SampledTokens(NamedTuple):
    """New tokens: ``ids`` int64 ``[R]``, sampled from ``logits`` float32 ``[R, V]``."""

    ids: torch.Tensor
    logits: torch.Tensor
