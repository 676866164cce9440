"""The number types in which Cohere's API returns vectors.

``int8`` and ``uint8`` scale each vector by its own largest absolute value. sentence-transformers and Cohere scale each
dimension by ranges of a calibration set, which a server doesn't have. A scale per vector keeps its direction, so
cosines of int8 vectors are those of the float vectors up to rounding.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
"""Vectors of one request, ``[N, D]``."""

OFFSET = 128  # difference of an unsigned byte and the signed one for the same number


def to_float(vectors: Vectors) -> list[list[float]]:
    """The numbers as they are."""
    numbers: list[list[float]] = vectors.tolist()
    return numbers


def to_base64(vectors: Vectors) -> list[str]:
    """Each vector's float32 bytes, little endian, in base64."""
    return [base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode() for vector in vectors]


def to_int8(vectors: Vectors) -> list[list[int]]:
    """``round(127 x / max|x|)``, the maximum being that of the vector; zero vectors stay zero."""
    numbers: list[list[int]] = _scaled(vectors).tolist()
    return numbers


def to_uint8(vectors: Vectors) -> list[list[int]]:
    """The int8 numbers + 128: 128 stands for 0."""
    numbers: list[list[int]] = (_scaled(vectors) + OFFSET).tolist()
    return numbers


def to_ubinary(vectors: Vectors) -> list[list[int]]:
    """Bit 1 for each number above 0, the first number in the highest bit; eight numbers per byte, padded with 0."""
    numbers: list[list[int]] = np.packbits(vectors > 0, axis=-1).tolist()
    return numbers


def to_binary(vectors: Vectors) -> list[list[int]]:
    """The ubinary bytes - 128."""
    numbers: list[list[int]] = (np.packbits(vectors > 0, axis=-1).astype(np.int16) - OFFSET).tolist()
    return numbers


def _scaled(vectors: Vectors) -> NDArray[np.int16]:
    """Integers from -127 to 127, ``[N, D]``."""
    largest = np.abs(vectors).max(axis=-1, keepdims=True)
    return np.rint(vectors / np.where(largest > 0, largest, 1) * 127).astype(np.int16)


TYPES: dict[str, Callable[[Vectors], list[Any]]] = {
    "float": to_float,
    "int8": to_int8,
    "uint8": to_uint8,
    "binary": to_binary,
    "ubinary": to_ubinary,
    "base64": to_base64,
}
"""Functions by the names of Cohere's ``embedding_types``. They return one list, or text, per vector."""
