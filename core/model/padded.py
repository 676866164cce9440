"""Forward passes for classes whose attention can't be replaced: padded batches with a mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from trunkline.core.cache.ledger import regime_of
from trunkline.kernels.layout import Layout

EVEN = 0.8  # the shortest row of a padded batch has at least this share of the longest one's tokens


def forward_padded(
    backbone: Any, tokens: Mapping[str, torch.Tensor], layout: Layout, boundaries: Sequence[int] = ()
) -> torch.Tensor:
    """Packed ids (and positions, token types), int64 ``[T]`` each -> packed hidden ``[T, hidden_size]``.

    Rows of about the same length share a batch, so that little is computed for padding. Rows on different
    sides of one of the ``boundaries`` (lengths in tokens) don't.
    """
    lengths = [int(end - start) for start, end in zip(layout.q_start, layout.q_start[1:], strict=False)]
    hidden: torch.Tensor | None = None
    for rows in groups(lengths, boundaries):
        width = max(lengths[row] for row in rows)
        index = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.int64)
        for line, row in enumerate(rows):
            start, length = int(layout.q_start[row]), lengths[row]
            index[line] = start  # padding: any token will do, the mask hides it
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
    assert hidden is not None  # a pass has at least one row
    return hidden


def groups(lengths: Sequence[int], boundaries: Sequence[int] = ()) -> Iterator[list[int]]:
    """Rows by batches, longest first: each at least :data:`EVEN` of its batch's longest, in the same regime."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if group:
            longest = lengths[group[0]]
            crosses = regime_of(lengths[row], boundaries) != regime_of(longest, boundaries)
            if crosses or lengths[row] < EVEN * longest:
                yield group
                group = []
        group.append(row)
    if group:
        yield group
