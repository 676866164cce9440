"""Prompts that are embeddings in place of token ids: read from messages, named in cache keys, put into a pass."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from trunkline.core.engine.scheduling.row import Row
from trunkline.core.errors import RequestError

MARK = b"\xfe"  # is in no salt before it: those are UTF-8 texts, joined by 0xff


def read_embeds(content: bytes, count: int) -> np.ndarray:
    """Float32 ``[count, width]``. RequestError if the bytes aren't that, or a number isn't finite."""
    if not count or len(content) % (4 * count):
        raise RequestError(f"{len(content)} bytes aren't float32 embeddings of {count} tokens.", param="input_embeds")
    embeds = np.frombuffer(content, np.float32).reshape(count, -1)
    if not np.isfinite(embeds).all():
        raise RequestError("Embeddings must be finite.", param="input_embeds")
    return embeds


def content_salt(content: bytes) -> bytes:
    """Separates the cached prefixes of embeddings from those of ids and of other embeddings; b"" for ids."""
    return MARK + hashlib.blake2b(content, digest_size=16).digest() if content else b""


def embeds_of(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray] | None:
    """The packed indices of a pass's tokens that are embeddings, int64 ``[N]``, and these, float32 ``[N, width]``.

    None if all tokens are ids.
    """
    if all(row.request.embeds is None for row in rows):
        return None
    indices: list[np.ndarray] = []
    taken: list[np.ndarray] = []
    packed = 0  # index of the row's first token in the packed axis
    for row in rows:
        if row.request.embeds is not None and row.start < len(row.request.embeds):
            taken.append(row.request.embeds[row.start : row.end])
            indices.append(np.arange(packed, packed + len(taken[-1])))
        packed += row.end - row.start
    if not taken:
        return None  # they decode, or compute output again after a retraction
    return np.concatenate(indices), np.concatenate(taken)
