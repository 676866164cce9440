"""Rotary embeddings whose frequencies depend on the length of the sequence.

transformers chooses such frequencies once per forward pass, by the largest position in it; for ``dynamic``,
earlier passes matter, too. Here the result of a sequence must not depend on the rest of the batch, on
the cache, or on earlier passes:

* **LongRoPE** has two sets of factors, one for sequences up to ``original_max_position_embeddings``
  tokens and one for longer ones. Each sequence has a *regime*: the number of boundaries that its
  length exceeds. Each token of a pass uses the frequencies of its sequence's regime. Keys of one
  regime are never used in another (the regime is part of the cache key).
* **Dynamic NTK** scaling has a different base for each length. We use one base for all sequences: that
  of the context length, as vLLM does.

The other types of ``modeling_rope_utils`` (default, linear, yarn, llama3, proportional) don't depend
on the length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

LONG, DYNAMIC, FIXED = "longrope", "dynamic", "default"


class RotaryRegimes:
    """Makes the rotary embedding of each sequence independent of the rest of the batch, for one model.

    ``boundaries``: the sorted lengths in tokens beyond which frequencies change; () for most models.
    """

    def __init__(self, backbone: torch.nn.Module, context_length: int) -> None:
        """Change the rotary modules of ``backbone`` in place.

        ``context_length``, in tokens, gives the base of dynamic scaling, and limits which boundaries can be exceeded.
        """
        found: set[int] = set()
        self._embeddings: list[_LongRotary] = []
        for module in backbone.modules():
            types = _types(module)
            for layer_type, kind in types.items():
                if DYNAMIC in kind:
                    _fix_dynamic(module, layer_type, context_length)
            limits = {key: _boundary(module, key) for key, kind in types.items() if kind == LONG}
            if limits:
                module.forward = embedding = _LongRotary(module.forward, limits)
                self._embeddings.append(embedding)
                found.update(limits.values())
        self.boundaries = tuple(sorted(length for length in found if length < context_length))

    @contextmanager
    def for_lengths(self, lengths: torch.Tensor | None) -> Iterator[None]:
        """Use the frequencies for sequences of these lengths, in a pass over packed tokens.

        ``lengths`` int64 ``[T]``: the length of each token's sequence, in tokens; None if none exceeds a boundary.
        """
        for embedding in self._embeddings:
            embedding.lengths = lengths
        try:
            yield
        finally:
            for embedding in self._embeddings:
                embedding.lengths = None


class _LongRotary:
    """Replaces the ``forward`` of a LongRoPE module.

    ``lengths`` int64 ``[T]``: the length of each packed token's sequence. With None, the module chooses the
    frequencies, which is right if no sequence of the pass exceeds the boundary.
    """

    def __init__(self, original: Any, boundaries: dict[str | None, int]) -> None:
        """``boundaries`` by layer type, or by None where the module has one set of frequencies."""
        self.original, self.boundaries = original, boundaries
        self.lengths: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        """Positions ``[1, T]`` -> what the module returns, cos and sin ``[1, T, R]`` each for most."""
        own = {} if layer_type is None else {"layer_type": layer_type}
        boundary = self.boundaries.get(layer_type)
        if self.lengths is None or boundary is None:
            return self.original(x, position_ids, **own)
        # The module chooses by the largest position. Clamped positions force the short frequencies (the clamped
        # ones themselves aren't used), and one appended position beyond the boundary forces the long ones.
        beyond = torch.full_like(position_ids[:, :1], boundary)
        short = self.original(x, position_ids.clamp(max=boundary - 1), **own)
        long = self.original(x, torch.cat([position_ids, beyond], dim=1), **own)
        is_long = (self.lengths > boundary)[None, :, None]
        if isinstance(short, torch.Tensor):
            return torch.where(is_long, long[:, :-1], short)
        return tuple(torch.where(is_long, one[:, :-1], other) for one, other in zip(long, short, strict=True))


def unknown_type(config: Any) -> str:
    """The first rope type in a transformers config that transformers doesn't implement; "" if there is none."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [parameters[key] or {} for key in config.nested_rope_parameter_keys(parameters)]
    known = {*ROPE_INIT_FUNCTIONS, "default", config.default_rope_type}
    given = [one.get("rope_type", "default") for one in by_layer_type or [parameters]]
    return next((str(kind) for kind in given if kind not in known), "")


def _types(module: torch.nn.Module) -> dict[str | None, str]:
    """The rope types of a rotary module by layer type, None standing for all layers; {} for other modules."""
    given: Any = getattr(module, "rope_type", None)
    if isinstance(given, dict):
        return dict(given)
    return {None: given} if isinstance(given, str) else {}


def _boundary(module: Any, layer_type: str | None) -> int:
    parameters = module.config.rope_parameters
    own = parameters if layer_type is None else parameters[layer_type]
    return int(own["original_max_position_embeddings"])


def _fix_dynamic(module: Any, layer_type: str | None, context_length: int) -> None:
    """Make the module compute its base for a sequence of the context length, then keep it from ever changing."""
    own = {} if layer_type is None else {"layer_type": layer_type}
    device = next(module.buffers()).device
    last = torch.full((1, 1), context_length - 1, device=device)
    module(torch.zeros(1, device=device), last, **own)
    if layer_type is None:
        module.rope_type = FIXED
    else:
        module.rope_type[layer_type] = FIXED
