"""Blocks of GGUF tensors against the package ``gguf``, for random bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from trunkline.core.model.sources.gguf.blocks import READ

ONE_FACTOR = {"Q4_0": 0, "Q5_0": 0, "Q8_0": 0, "Q6_K": 208}  # where a block's float16 number is; others have two


@pytest.mark.parametrize("name", list(READ))
def test_numbers_are_those_of_the_package(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    size, count = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(3)
    blocks = random.integers(0, 256, (200, count), dtype=np.uint8)
    for at in [ONE_FACTOR[name]] if name in ONE_FACTOR else [0, 2]:
        blocks[:, at : at + 2] = random.normal(size=(200, 1)).astype(np.float16).view(np.uint8)
    found = READ[name](blocks)
    groups = found.codes.reshape(200, found.scales.shape[1], -1).astype(np.float32) - found.zero
    numbers = groups * found.scales[..., None]
    if found.minima is not None:
        numbers = numbers - found.minima[..., None]
    assert np.array_equal(numbers.reshape(200, size), gguf.dequantize(blocks, kind).reshape(200, size))
    assert found.codes.max() < 2**found.bits
