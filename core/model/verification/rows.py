"""Verification at load of the deterministic mode: sequences alone, together, in chunks and decoded, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count as count_from
from typing import NamedTuple

import numpy as np
import torch

from trunkline.core.cache.pool import KVPool, KVShape
from trunkline.core.errors import ModelError
from trunkline.core.model.attention import ForwardContext, packed_layout, paged_layout
from trunkline.core.model.fusion.decoder_forward import FusedForward
from trunkline.core.model.packed import PackedModel

from .samples import Sample, warm_up_ids

LENGTHS = (37, 1, 150, 6)  # tokens of the sequences
CHUNKS = (1, 16, 5, 64, 1)  # tokens of the passes of each sequence, in turn


def verify_rows(model: PackedModel, shapes: Sequence[KVShape], kv_dtype: torch.dtype) -> None:
    """ModelError unless each hidden row has the same bits alone and in other batches.

    ``shapes``: each layer's key and value shape, () for encoders. ``kv_dtype``: of the KV pool.
    """
    name = model.info.architecture
    try:
        sequences = _sequences(model)
        cache = _Cache(shapes, kv_dtype)
        alone = [_whole(model, [one], cache)[0] for one in sequences]
        others = [_whole(model, sequences, cache)]
        if shapes:
            others += [_chunked(model, sequences, cache, shift) for shift in range(2)]
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{name} can't be served with --enable-deterministic-inference: {error}.") from error
    for rows in others:
        if not all(torch.equal(mine, expected) for mine, expected in zip(rows, alone, strict=True)):
            raise ModelError(
                f"{name} can't be served with --enable-deterministic-inference: its results for a text depend on the "
                "other texts of a batch, or on how a text is divided into passes."
            )


def _sequences(model: PackedModel) -> list[Sample]:
    """Sequences of :data:`LENGTHS`; every second one ends the context if rotary frequencies depend on the length."""
    context = model.info.context_length
    lengths = [min(length, context) for length in LENGTHS]
    far = bool(model.length_boundaries)
    starts = [context - length if far and number % 2 == 0 else 0 for number, length in enumerate(lengths)]
    ids = torch.split(warm_up_ids(model, sum(lengths)), lengths)
    return [Sample(own, start) for own, start in zip(ids, starts, strict=True)]


def _inputs(
    model: PackedModel, sequences: Sequence[Sample], spans: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Ids, positions and lengths of a pass over the tokens ``[begin, end)`` of each sequence, as the engine gives
    them: no lengths unless one exceeds a boundary."""
    pairs = list(zip(sequences, spans, strict=True))
    ids = torch.cat([one.ids[begin:end] for one, (begin, end) in pairs])
    positions = torch.cat([one.positions(begin, end) for one, (begin, end) in pairs]).to(model.device)
    lengths = torch.cat([torch.full((end - begin,), one.length) for one, (begin, end) in pairs]).to(model.device)
    exceeded = any(int(lengths.max()) > boundary for boundary in model.length_boundaries)
    return ids, positions, lengths if exceeded else None


class _Cache(NamedTuple):
    """The KV pool's shapes by layer, () for encoders, and its dtype."""

    shapes: Sequence[KVShape]
    dtype: torch.dtype

    def allocate(self, model: PackedModel, counts: Sequence[int]) -> tuple[KVPool, np.ndarray]:
        """A pool for sequences of ``counts`` tokens, and a slot table."""
        pool = KVPool(self.shapes, sum(counts), self.dtype, model.device)
        table = np.zeros((len(counts), max(counts)), np.int32)
        slots = np.split(np.arange(sum(counts), dtype=np.int32)[::-1], np.cumsum(counts)[:-1])
        for row, own in enumerate(slots):
            table[row, : len(own)] = own
        return pool, table


def _whole(model: PackedModel, sequences: Sequence[Sample], cache: _Cache) -> Sequence[torch.Tensor]:
    """The hidden rows of whole sequences, computed in one pass, layer by layer as in a pass that is too large to be
    recorded.
    """
    counts = [len(one.ids) for one in sequences]
    spans = [(0, count) for count in counts]
    ids, positions, lengths = _inputs(model, sequences, spans)
    if cache.shapes:
        pool, table = cache.allocate(model, counts)
        context = ForwardContext(paged_layout(table, spans, model.device), pool, model.backend)
    else:
        context = ForwardContext(packed_layout(counts), None, model.backend)
    with _unrecorded(model):
        return torch.split(model.run(ids, positions, context, lengths=lengths), counts)


@contextmanager
def _unrecorded(model: PackedModel) -> Iterator[None]:
    """Launches run one by one: :func:`_chunked` compares recorded passes with these."""
    forward = model.backbone.forward
    if not isinstance(forward, FusedForward):
        yield
        return
    replay, row_parallel = forward.replay, forward.row_parallel
    forward.replay, forward.row_parallel = False, None
    try:
        yield
    finally:
        forward.replay, forward.row_parallel = replay, row_parallel


def _chunked(model: PackedModel, sequences: Sequence[Sample], cache: _Cache, shift: int) -> list[torch.Tensor]:
    """The hidden rows of sequences in passes of :data:`CHUNKS`, from that number on; one token at a time is decoded."""
    counts = [len(one.ids) for one in sequences]
    pool, table = cache.allocate(model, counts)
    done = [0] * len(counts)
    pieces: list[list[torch.Tensor]] = [[] for _ in counts]
    for number in count_from(shift):
        spans = {
            row: (done[row], min(count, done[row] + CHUNKS[(number + row) % len(CHUNKS)]))
            for row, count in enumerate(counts)
            if done[row] < count
        }
        if not spans:
            break
        # Decoding rows are the first of a pass.
        order = sorted(spans, key=lambda row: (spans[row][0] == 0 or spans[row][1] - spans[row][0] != 1, row))
        chosen = [spans[row] for row in order]
        layout = paged_layout(table, chosen, model.device)
        layout.table_row[:] = order
        out_slots = [table[row, start:end] for row, (start, end) in zip(order, chosen, strict=True)]
        layout.out_slots = torch.from_numpy(np.concatenate(out_slots).astype(np.int64)).to(model.device)
        ids, positions, lengths = _inputs(model, [sequences[row] for row in order], chosen)
        hidden = model.forward(ids, positions, layout, pool, lengths=lengths)
        for row, part in zip(order, torch.split(hidden, [end - start for start, end in chosen]), strict=True):
            pieces[row].append(part.clone())  # recorded layers write the next pass's rows to the same memory
            done[row] = spans[row][1]
    return [torch.cat(own) for own in pieces]
