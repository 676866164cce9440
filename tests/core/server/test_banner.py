from __future__ import annotations

import pytest

from trunkline.core.server.banner import memory_line


@pytest.mark.parametrize(
    ("pool", "text"),
    [
        (3 << 20, "m: weights 2 MiB, KV pool 3 MiB for 4096 tokens"),
        (0, "m: weights 2 MiB, no KV pool, up to 4096 tokens per pass"),
    ],
)
def test_memory_of_a_model(pool: int, text: str) -> None:
    assert memory_line({"model": "m", "weight_bytes": 2 << 20, "kv_bytes": pool, "tokens": 4096}) == text
