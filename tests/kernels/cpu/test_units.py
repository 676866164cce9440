"""How rows are divided into blocks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from trunkline.kernels.cpu.units import TILE, _even_block


def block_of(rows: int, most: int) -> int:
    size: int = _even_block(SimpleNamespace(rows=rows, block=most))
    return size


@pytest.mark.parametrize(
    ("rows", "most", "block"),
    [(1, 120, 1), (32, 120, 32), (128, 120, 72), (256, 84, 72), (256, 120, 96), (1024, 252, 216)],
)
def test_known_sizes(rows: int, most: int, block: int) -> None:
    assert block_of(rows, most) == block


@pytest.mark.parametrize("most", [12, 24, 84, 120, 252])
def test_no_more_blocks_than_necessary(most: int) -> None:
    """And all but the only one are whole tiles."""
    for rows in range(1, 1100):
        block = block_of(rows, most)
        assert block <= most
        assert -(-rows // block) <= -(-rows // most)
        assert block == rows or block % TILE == 0
