"""Passes of many tokens run block by block of rows, and give the same bits as layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trunkline.core import Engine
from trunkline.core.cache.pool import KVPool
from trunkline.core.model.attention import packed_layout, paged_layout
from trunkline.core.model.fusion import row_parallel
from trunkline.core.model.fusion.recorded import CAPACITY
from trunkline.core.model.loaded import LoadedModel
from trunkline.kernels.cpu.launches import changes, row_blocks
from trunkline.kernels.cpu.processor import has_bfloat16_pairs

ENCODERS, DECODERS = ["bert", "roberta", "distilbert", "xlm-roberta"], ["llama", "qwen2", "qwen3", "gemma2"]
MAX_LEN = 600


class World:
    """A loaded model, whose long passes are row-parallel or not."""

    def __init__(self, folder: Path, dtype: torch.dtype, **options: Any) -> None:
        self.engine = Engine(str(folder), dtype=str(dtype).removeprefix("torch."), threads=2, **options)
        transport: Any = self.engine.client.transport
        self.model: LoadedModel = transport.loop.lanes[0].model
        self.forward = self.model.backbone.forward
        self.blocks = self.forward.row_parallel
        call, layers = self.forward.layers[0].call, len(self.forward.layers)
        shapes = [(call.kv_heads, call.width, call.width)] * layers
        self.pool = KVPool(shapes, MAX_LEN * 4, dtype, torch.device("cpu")) if call.causal else None
        self.table = np.random.default_rng(0).permutation(MAX_LEN * 4).astype(np.int32).reshape(4, -1)

    def run(self, spans: list[tuple[int, int]], wanted: list[int] | None, *, blocks: bool) -> torch.Tensor:
        """The hidden rows and what was written to the pool, as one vector."""
        layout = packed_layout([end - start for start, end in spans])
        stored: list[torch.Tensor] = []
        if self.pool is not None:
            layout, stored = paged_layout(self.table, spans), [*self.pool.keys, *self.pool.values]
            noise = torch.Generator().manual_seed(1)
            for tensor in stored:
                tensor.normal_(generator=noise)
        ids = (torch.arange(sum(end - start for start, end in spans)) * 31 + 7) % 100 + 5
        places = torch.cat([torch.arange(start, end) for start, end in spans])
        needed = None if wanted is None else torch.tensor(wanted, dtype=torch.int64)
        self.forward.row_parallel = self.blocks if blocks else None
        hidden = self.model.forward(ids, places, layout, self.pool, wanted=needed)
        return torch.cat([one.flatten() for one in (hidden, *stored)])


@pytest.fixture(scope="module")
def worlds(zoo: Callable[[str], Path]) -> Iterator[Callable[..., World]]:
    made: dict[Any, World] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> World:
        if (name, dtype) not in made:
            checkpoint, _, quantization = name.partition(" ")
            options = {"quantization": quantization} if quantization else {}
            made[name, dtype] = World(zoo(checkpoint), dtype, **options)
        return made[name, dtype]

    yield get
    for world in made.values():
        world.engine.close()


KINDS = [
    *((name, torch.float32) for name in (*ENCODERS, *DECODERS, "bert int8", "llama int8", "llama int4")),
    *(
        pytest.param(
            name,
            torch.bfloat16,
            marks=pytest.mark.skipif(not has_bfloat16_pairs(), reason="oneDNN's products aren't recorded"),
        )
        for name in ("bert", "llama")
    ),
]


@st.composite
def passes(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[int] | None]:
    """Sequences of more tokens than are recorded, and the tokens that are wanted."""
    lengths = draw(st.lists(st.integers(CAPACITY, MAX_LEN // 2) | st.integers(1, 40), min_size=1, max_size=3))
    lengths.append(CAPACITY + 1)
    starts = [draw(st.integers(0, MAX_LEN - length)) for length in lengths]
    wanted = draw(st.none() | st.lists(st.integers(0, sum(lengths) - 1), unique=True).map(sorted))
    return [(start, start + length) for start, length in zip(starts, lengths, strict=True)], wanted


@pytest.mark.parametrize(("name", "dtype"), KINDS)
@given(each=passes())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_bits_as_layer_by_layer(
    worlds: Callable[..., World], name: str, dtype: torch.dtype, each: tuple[Any, Any]
) -> None:
    world = worlds(name, dtype)
    assert world.blocks is not None
    spans, wanted = each
    if world.pool is None:  # an encoder has no cached prefixes, and no more positions than these
        spans = [(0, min(end - start, 60)) for start, end in spans]
        wanted = None if wanted is None else [one for one in wanted if one < sum(end for _, end in spans)]
    assert world.blocks.suits(torch.empty(sum(end - start for start, end in spans), 0))
    expected = world.run(spans, wanted, blocks=False)
    assert torch.equal(world.run(spans, wanted, blocks=True), expected)


def test_models_without_it(worlds: Callable[..., World], monkeypatch: pytest.MonkeyPatch) -> None:
    assert worlds("qwen3-moe").blocks is None  # what is between the attention of two layers isn't computed by rows
    world = worlds("llama")
    found = [world.forward.layers, world.forward.like, world.forward.backend]
    assert row_parallel.row_parallel(*found) is not None
    monkeypatch.setattr(row_parallel, "WIDEST", 4 * world.forward.layers[0].gate_up.out_features - 1)
    assert row_parallel.row_parallel(*found) is None


def test_other_results_are_noticed(worlds: Callable[..., World]) -> None:
    world = worlds("llama")

    def another_when_recorded(x: torch.Tensor, activation: str, out: torch.Tensor | None = None) -> torch.Tensor:
        return world.forward.backend.glu(x, activation if out is None else "gelu_tanh", out)

    other = replace(world.forward.backend, glu=another_when_recorded)
    assert row_parallel.row_parallel(world.forward.layers, world.forward.like, other) is None


@pytest.mark.parametrize("source", [0, changes._CLAIMED], ids=["addresses of x", "counters of units"])
def test_what_is_not_written_is_noticed(
    worlds: Callable[..., World], monkeypatch: pytest.MonkeyPatch, source: int
) -> None:
    def without(*given: Any) -> list[tuple[int, int, int, int]]:
        return [one for one in changes.changes_of(*given) if one[1] != source]

    monkeypatch.setattr(row_blocks, "changes_of", without)
    forward = worlds("llama").forward
    assert row_parallel.row_parallel(forward.layers, forward.like, forward.backend) is None


def test_few_rows_are_computed_by_all_threads_together(worlds: Callable[..., World]) -> None:
    blocks = worlds("bert").blocks
    assert not blocks.suits(torch.empty(2 * row_parallel.MIN_ROWS_PER_THREAD - 1, 0))
    assert blocks.suits(torch.empty(2 * row_parallel.MIN_ROWS_PER_THREAD, 0))
