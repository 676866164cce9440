"""Forward passes for classes whose attention can't be replaced: padded batches with a mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from trunkline.core.cache.ledger import regime_of
from trunkline.kernels.layout import Layout

MIN_LENGTH_RATIO = 0.8  # of the shortest to the longest row of a padded batch


def forward_padded(
    backbone: Any, tokens: Mapping[str, torch.Tensor], layout: Layout, boundaries: Sequence[int] = ()
) -> torch.Tensor:
    """Packed ``tokens`` (ids, positions, token types; int64 ``[T]`` each) -> packed hidden ``[T, hidden_size]``.

    Rows of similar length share a padded batch, so that little is computed for padding. Rows on different
    sides of one of the ``boundaries`` (lengths in tokens) never share one.
    """
    lengths = [int(end - start) for start, end in zip(layout.q_start, layout.q_start[1:], strict=False)]
    hidden: torch.Tensor | None = None
    for rows in batches(lengths, boundaries):
        width = max(lengths[row] for row in rows)
        index = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for line, row in enumerate(rows):
            start, length = int(layout.q_start[row]), lengths[row]
            index[line] = start  # padding: any token, since the mask hides it
            index[line, :length] = torch.arange(start, start + length)
            mask[line, :length] = 1
        some = tokens["input_ids"]
        index, mask = index.to(some.device), mask.to(some.device)
        batch = {name: values[index] for name, values in tokens.items()}
        output = backbone(**batch, attention_mask=mask).last_hidden_state
        if hidden is None:
            hidden = output.new_empty(len(some), output.shape[2])
        real = mask.bool()
        hidden[index[real]] = output[real]
    assert hidden is not None  # since a pass has at least one row
    return hidden


def batches(lengths: Sequence[int], boundaries: Sequence[int] = ()) -> Iterator[list[int]]:
    """Divide rows into padded batches, longest rows first.

    All rows of a batch are of one rotary regime, and at least :data:`MIN_LENGTH_RATIO` times as long as its
    longest.
    """
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if group:
            longest = lengths[group[0]]
            crosses = regime_of(lengths[row], boundaries) != regime_of(longest, boundaries)
            if crosses or lengths[row] < MIN_LENGTH_RATIO * longest:
                yield group
                group = []
        group.append(row)
    if group:
        yield group
