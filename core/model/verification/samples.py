"""Warm-up sequences on which fast paths are compared with transformers' own forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trunkline.core.model.packed import PackedModel

WARM_UP = (6, 19)  # lengths in tokens of the two warm-up sequences; the first ends with a decode pass
WHOLE_WARM_UP = (6, 16, 19)  # the same for encoders; the last two are in one padded batch
FAR = 8  # length in tokens of the sequences that begin at later positions


@dataclass(frozen=True, slots=True)
class Sample:
    """A warm-up sequence: ids, int64 ``[n]``, at the positions ``[start, length)``.

    ``start`` has an effect only on rotary embeddings and position tables.
    """

    ids: torch.Tensor
    start: int = 0

    @property
    def length(self) -> int:
        return self.start + len(self.ids)

    def positions(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """int64: the positions of its tokens ``[begin, end)``."""
        return torch.arange(self.start + begin, self.start + (len(self.ids) if end is None else end))


def samples(model: PackedModel) -> list[Sample]:
    """Sequences of different lengths from position 0 on, then short ones at later positions.

    The latter are at the end of the context, and across each length beyond which rotary frequencies change.
    """
    context = model.info.context_length
    wanted = WARM_UP if model.info.causal else WHOLE_WARM_UP
    lengths = [max(2, min(length, context)) for length in wanted]
    starts = [0] * len(lengths)
    if "position_ids" in model.takes and context > max(lengths) + FAR:
        later = [context - FAR, *(boundary - FAR // 2 for boundary in model.length_boundaries)]
        starts, lengths = starts + later, lengths + [FAR] * len(later)
    ids = torch.split(warm_up_ids(model, sum(lengths)), lengths)
    return [Sample(own, start) for own, start in zip(ids, starts, strict=True)]


def warm_up_ids(model: PackedModel, count: int) -> torch.Tensor:
    """Arbitrary ids, int64 ``[count]``: the same on every run, and without the padding id.

    Some classes treat the padding id differently, when they number positions or choose the row to score.
    """
    vocabulary = model.info.vocab_size
    ids = (torch.arange(count) * 7919 + 11) % vocabulary
    padding = model.whole.config.get_text_config().pad_token_id
    if padding is not None:
        ids = torch.where(ids == padding, (ids + 1) % vocabulary, ids)
    return ids.to(model.device)
