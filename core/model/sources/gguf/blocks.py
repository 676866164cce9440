"""Reads the blocks of quantised GGUF tensors as integers with scales, which the CPU's kernels multiply as they are.

The layouts are ggml's (``ggml-common.h``); ``gguf.quants`` has the same numbers as floats, with which tests compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Bytes = np.ndarray[tuple[int, int], np.dtype[np.uint8]]  # [blocks, bytes of a block]


class Blocks(NamedTuple):
    """A tensor's blocks: codes uint8 [blocks, numbers]; scales and minima float32 [blocks, groups].

    Numbers are ``scale * (code - zero) - minimum``.
    """

    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None = None
    zero: int = 0
    bits: int = 8


def _halves(blocks: Bytes, at: int) -> np.ndarray:
    """The float16 number at a byte of each block, as float32 [blocks, 1]."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(blocks: Bytes) -> np.ndarray:
    """The low halves of all bytes, then the high ones."""
    return np.concatenate([blocks & 15, blocks >> 4], axis=1)


def _fifth_bits(blocks: Bytes, at: int) -> np.ndarray:
    """32 bits of each block, as 0 or 16: [blocks, 32]."""
    return np.unpackbits(blocks[:, at : at + 4].copy(), axis=1, bitorder="little") << 4


def _q4_0(blocks: Bytes) -> Blocks:
    return Blocks(_nibbles(blocks[:, 2:]), _halves(blocks, 0), zero=8, bits=4)


def _q4_1(blocks: Bytes) -> Blocks:
    return Blocks(_nibbles(blocks[:, 4:]), _halves(blocks, 0), -_halves(blocks, 2), bits=4)


def _q5_0(blocks: Bytes) -> Blocks:
    return Blocks(_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2), _halves(blocks, 0), zero=16)


def _q5_1(blocks: Bytes) -> Blocks:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return Blocks(codes, _halves(blocks, 0), -_halves(blocks, 2))


def _q8_0(blocks: Bytes) -> Blocks:
    return Blocks(blocks[:, 2:] ^ 0x80, _halves(blocks, 0), zero=128)  # int8 plus 128


def _scales_of_k(blocks: Bytes) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of eight groups: 6 bits each, in 12 bytes after two float16 factors."""
    packed = blocks[:, 4:16]
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    return scales * _halves(blocks, 0), minima * _halves(blocks, 2)


def _pairs_of_groups(quants: Bytes) -> np.ndarray:
    """Of each 32 bytes, the low halves and then the high ones: [blocks, 256]."""
    runs = quants.reshape(len(quants), 4, 1, 32)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(quants), 256)


def _q4_k(blocks: Bytes) -> Blocks:
    return Blocks(_pairs_of_groups(blocks[:, 16:]), *_scales_of_k(blocks), bits=4)


def _q5_k(blocks: Bytes) -> Blocks:
    fifth = blocks[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8)[:, None] & 1
    codes = _pairs_of_groups(blocks[:, 48:]) | (fifth << 4).reshape(len(blocks), 256)
    return Blocks(codes, *_scales_of_k(blocks))


def _q6_k(blocks: Bytes) -> Blocks:
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([low & 15, low >> 4], axis=2)  # of each half, four runs of 32
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    codes = low | (high >> shifts & 3) << 4
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32) * _halves(blocks, 208)
    return Blocks(codes.reshape(len(blocks), 256), scales, zero=32)


READ: dict[str, Callable[[Bytes], Blocks]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""By the name of a type in GGUF."""
