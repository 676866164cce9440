"""Verification at load of the deterministic mode: sequences alone, together, in chunks and decoded, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trunkline.core.cache.pool import KVPool, KVShape
from trunkline.core.errors import ModelError

from .attention import ForwardContext, packed_layout, paged_layout
from .packed import PackedModel
from .samples import warm_up_ids

LENGTHS = (37, 1, 150, 6)  # tokens of the sequences
CHUNKS = (1, 16, 5, 64, 1)  # tokens of the passes of each sequence, in turn

Spans = list[tuple[int, int]]


def verify_rows(model: PackedModel, shapes: Sequence[KVShape]) -> None:
    """ModelError unless each hidden row has the same bits alone and in other batches.

    ``shapes``: each layer's key and value shape, () for encoders.
    """
    name = model.info.architecture
    try:
        lengths = [min(length, model.info.context_length) for length in LENGTHS]
        sequences = torch.split(warm_up_ids(model, sum(lengths)), lengths)
        alone = [_whole(model, [ids])[0] for ids in sequences]
        others = [_whole(model, sequences)]
        if shapes:
            others += [_chunked(model, sequences, shapes, shift) for shift in range(2)]
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(f"{name} can't be served with --enable-deterministic-inference: {error}.") from error
    for rows in others:
        if not all(torch.equal(mine, expected) for mine, expected in zip(rows, alone, strict=True)):
            raise ModelError(
                f"{name} can't be served with --enable-deterministic-inference: its results for a text depend on the "
                "other texts of a batch, or on how a text is divided into passes."
            )


def _whole(model: PackedModel, sequences: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The hidden rows of whole sequences, computed in one pass."""
    counts = [len(ids) for ids in sequences]
    positions = torch.cat([torch.arange(count) for count in counts]).to(model.device)
    context = ForwardContext(packed_layout(counts), None, model.backend)
    return torch.split(model.run(torch.cat(list(sequences)), positions, context), counts)


def _chunked(
    model: PackedModel, sequences: Sequence[torch.Tensor], shapes: Sequence[KVShape], shift: int
) -> list[torch.Tensor]:
    """The hidden rows of sequences in passes of :data:`CHUNKS`, from that number on; one token at a time is decoded."""
    counts = [len(ids) for ids in sequences]
    pool = KVPool(list(shapes), sum(counts), model.dtype, model.device)
    table = np.zeros((len(counts), max(counts)), np.int32)
    slots = np.split(np.arange(sum(counts), dtype=np.int32)[::-1], np.cumsum(counts)[:-1])
    for row, own in enumerate(slots):
        table[row, : len(own)] = own
    done, pieces, number = [0] * len(counts), [[] for _ in counts], shift  # type: tuple[list[int], list[list[torch.Tensor]], int]
    while any(at < count for at, count in zip(done, counts, strict=True)):
        left = [row for row, count in enumerate(counts) if done[row] < count]
        spans: dict[int, tuple[int, int]] = {}
        for row in left:
            spans[row] = done[row], min(counts[row], done[row] + CHUNKS[(number + row) % len(CHUNKS)])
        # Decoding rows are the first of a pass.
        order = sorted(left, key=lambda row: (spans[row][0] == 0 or spans[row][1] - spans[row][0] != 1, row))
        number += 1
        layout = paged_layout(table[order], [spans[row] for row in order], model.device)
        ids = torch.cat([sequences[row][slice(*spans[row])] for row in order])
        positions = torch.cat([torch.arange(*spans[row]) for row in order]).to(model.device)
        hidden = model.forward(ids, positions, layout, pool)
        for row, part in zip(order, torch.split(hidden, [end - start for start, end in map(spans.get, order)]), strict=True):
            pieces[row].append(part.clone())  # recorded layers write the next pass's rows to the same memory
            done[row] = spans[row][1]
    return [torch.cat(own) for own in pieces]
